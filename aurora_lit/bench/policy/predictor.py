"""How many tokens each shape promises at a position, learned from what a policy could observe; cross-validated.

This stands for what a learned policy could know at best. It is trained offline on every position, with the outcome of
every shape, where a policy that learns online sees only the outcome of the shape that it chose. A request's promises
come from a network that was trained on other requests.

What it observes: the target's hidden state, and whether the draft's first choices were right so far, even where serving
would not have drafted. With `sees_draft` also how sure the draft is at this position, before that is paid for: more
than any policy can have, unless it decides between two levels.

Shapes: N positions, F features, S shapes of the draft, J levels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from aurora_lit.bench.policy.choices import draft_shapes
from aurora_lit.bench.policy.recording import Recording
from aurora_lit.serve.speculation.costs import DraftShape

_FOLDS, _EPOCHS, _BATCH = 5, 24, 256
_DECAYS = (0.8, 0.95)


def features(recording: Recording, accepted_NS: np.ndarray, *, sees_draft: bool) -> torch.Tensor:
    """What is observed at each position, fp32 [N, F], standardised."""
    longest_N = accepted_NS[:, draft_shapes(recording).index(DraftShape(recording.draft_tokens))]
    depth = recording.draft_tokens
    history_NF = torch.zeros(len(longest_N), depth + len(_DECAYS) + 3)
    for answer in recording.answers:
        means, deep = [0.5] * len(_DECAYS), 0.5 * depth
        hits: list[float] = [0.5] * depth
        for i in range(len(answer.token_ids)):
            known = [*hits[-depth:], *means, deep, np.log1p(i), np.log1p(len(answer.prompt_ids))]
            history_NF[answer.first + i] = torch.tensor(known)
            # Only what is known by the next position: the token at i, and all levels proposed `depth` positions ago.
            hit = float(longest_N[answer.first + i] >= 1)
            hits.append(hit)
            means = [decay * mean + (1 - decay) * hit for decay, mean in zip(_DECAYS, means, strict=True)]
            if i >= depth - 1:
                deep += 0.1 * (float(longest_N[answer.first + i - depth + 1]) - deep)
    parts = [history_NF, recording.hidden_NH.float()]
    if sees_draft:
        parts += [recording.chain_outcome_NJ, recording.tree_outcome_NGJ.flatten(1).clamp(1e-6).log()]
    x_NF = torch.cat(parts, dim=1)
    return (x_NF - x_NF.mean(0)) / x_NF.std(0).clamp(1e-6)


def promises(recording: Recording, accepted_NS: np.ndarray, *, sees_draft: bool, seed: int = 0) -> np.ndarray:
    """Expected accepted tokens by shape, [N, S]; each request's by a network that was trained on others."""
    x_NF, y_NS = features(recording, accepted_NS, sees_draft=sees_draft), torch.from_numpy(accepted_NS).float()
    fold_N = torch.zeros(len(x_NF), dtype=torch.int64)
    for i, answer in enumerate(recording.answers):
        fold_N[answer.first : answer.first + len(answer.token_ids)] = i % _FOLDS
    promise_NS = torch.zeros_like(y_NS)
    for fold in range(_FOLDS):
        net = _trained(x_NF[fold_N != fold], y_NS[fold_N != fold], seed=seed)
        with torch.no_grad():
            promise_NS[fold_N == fold] = net(x_NF[fold_N == fold])
    return promise_NS.clamp(0.0, recording.draft_tokens).numpy()


def _trained(x_NF: torch.Tensor, y_NS: torch.Tensor, *, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(64, y_NS.shape[1])
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(x_NF.shape[1], 64), nn.GELU(), head)
    with torch.no_grad():
        head.bias.copy_(y_NS.mean(0))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=_EPOCHS)
    for _ in range(_EPOCHS):
        for index_B in torch.split(torch.randperm(len(x_NF), generator=generator), _BATCH):
            loss = nn.functional.mse_loss(net(x_NF[index_B]), y_NS[index_B])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        schedule.step()
    return net.eval()


def explained(promise_NS: np.ndarray, accepted_NS: np.ndarray) -> float:
    """The share of the variance of what is accepted that the promises explain, over all shapes."""
    return float(1 - ((accepted_NS - promise_NS) ** 2).sum() / ((accepted_NS - accepted_NS.mean(0)) ** 2).sum())
