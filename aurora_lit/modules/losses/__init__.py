"""What the draft is trained on: acceptance losses, unrolled draft steps, and the LightningModule.

The LK loss (Samarin et al. 2026, "LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding", arXiv
2602.23881) trains the acceptance rate α itself; here it is λ · KL(p ‖ q) + (1 − λ) · (1 − α), with λ = exp(−3 α).

Learning uses this folder; serving imports none of it.

May import: kernels/, modules/sampling/, modules/draft/. Start with draft_module.py. The files, each importing only
those above it:

    lk.py            acceptance in closed form, and the LK loss: definitions
    ppo.py           PPO with acceptance as reward, over all actions: definitions
    token_sample.py  a sample of the draft vocabulary for a batch's loss
    fused_lk.py      the LK loss and its gradients from hidden states, in chunks
    batch.py         the batches: padded traces, and what was proposed along them
    unroll.py        the draft's chains in training, along traces
    objective.py     weights of the loss's terms, and what a step reports of them
    chain_losses.py  the LK and value losses of chains, ending those that are hardly reached
    muon.py          Muon by blocks of rows, the optimizer of the draft's matrices
    draft_module.py  the draft as a LightningModule: its losses, optimizers and clipping
"""
