"""What the draft is trained on: acceptance and PPO losses, unrolled draft steps, and the LightningModule that joins them. Serving imports none of it except nothing.

May import: kernels/, modules/sampling/, modules/draft/. Start with draft_module.py. The files, each importing only those above it:

    lk.py            how well a draft is accepted: closed forms, the LK loss
    ppo.py           PPO with acceptance as discount: advantages, clipped policy loss, value loss
    batch.py         what a draft learns from: padded traces, and the rounds served along them
    unroll.py        the draft's chains in training: from every position, and along what rounds proposed
    policy.py        the policy terms: which rounds may be learnt from, and their losses
    draft_module.py  the draft as a LightningModule: LK and value loss, online the policy terms; learning only
"""
