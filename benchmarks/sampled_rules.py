"""Which exact verification rule accepts most of a sampled request's proposals.

    python benchmarks/sampled_rules.py --prompts FILE... --limit 12 --max-tokens 64

p is the target's distribution and q the draft's, both at the request's temperature; q is 0 outside the draft's
vocabulary. Each rule below leaves the output's distribution as it is:

- R, the ratio test (arXiv 2211.17192): a proposal drawn from q is accepted with probability min(1, p/q).
- M, matching: the target draws its token from p; a proposal is accepted if it is that token. Children are the most
  probable tokens of q.
- S, shared noise (arXiv 2408.07978): the target's token is argmax(log p + g) with Gumbel noise g, one number for each
  token and position; children are the largest log q + g. Accepted, again, if equal.

First the acceptance of the first level, over all positions of the answers. Then, for S, how well the softmax of
(log q + g) / tau predicts that a child is accepted. Then accepted lengths of whole rounds, which go from root to root
along the answers: chains by depth, and trees as serving drafted them until b1d56e7: of each level the best `width`
nodes are expanded to `width` children, and the best nodes of all levels are kept. A node's score is the sum of its
path's predicted log-probabilities. Rounds that could reach beyond the answer's end are not counted.

Noise for an answer that exists already is drawn given that answer. With E = exp(-g), which is exponential, the target's
token is the argmin of E / p. That minimum, m, is exponential too, and each other E is p·m plus an exponential number.

Shapes: A answer tokens, D draft vocabulary (in E and p, column D is all other tokens together), K levels, R roots of
rounds, W nodes of a level, Q = R·W, C children of a node, L path to a node, N nodes of a tree or predictions, U values
of tau, S answers, H hidden size.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aurora_lit.bench.prompts import BenchPrompt, load_prompts
from aurora_lit.config import load_config
from aurora_lit.machine import use_threads
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.unroll import UnrolledChains, unroll, unroll_rounds
from aurora_lit.serve.speculation.runtime_draft import prepare_draft
from aurora_lit.serve.worker.load_models import eos_token_ids, load_serving_target, load_tokenizer, starting_draft

WIDTHS = (1, 2, 3, 4)
NODES = (7, 15)
LEVELS = 5
BINS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
SCORED_NOISES = 8  # of a position, for the predictions


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sampled answer, and what the target and the draft say along it."""

    domain: str
    first: int
    """Position of the answer's first token."""
    p_AD: Tensor
    """The target's distributions, [A, D + 1]."""
    label_A: Tensor
    """The answer's tokens as draft ids; D if the draft has no such token."""
    chains: UnrolledChains
    """The draft's chains along the answer."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Target and draft at one temperature."""

    target: Target
    draft: Eagle3Draft
    embedding_VH: Tensor
    target_id_D: Tensor
    """The target's id of each token of the draft."""
    draft_id_V: Tensor
    """The draft's id of each token of the target, or −1."""
    eos: frozenset[int]
    temperature: float
    taus: Sequence[float]

    def sample(self, prompt: BenchPrompt, *, max_tokens: int) -> Sample:
        """Sample the target's answer by plain decoding, and run the draft along it."""
        target, ids = self.target, list(prompt.token_ids)
        cache, slot_1 = target.make_kv_cache(num_slots=1, capacity=len(ids) + max_tokens), torch.zeros(1).long()
        read_1T = torch.tensor([ids[:-1]])
        aux = [target(read_1T, kv_cache=cache, slots_B=slot_1, starts_B=slot_1, num_prompts=1)[0]]
        rows: list[Tensor] = []
        while len(rows) < max_tokens and not (rows and ids[-1] in self.eos):
            start_1 = torch.tensor([len(ids) - 1])
            aux_11F, last_11H = target(torch.tensor([ids[-1:]]), kv_cache=cache, slots_B=slot_1, starts_B=start_1)
            p_V = (target.logits(last_11H)[0, 0] / self.temperature).softmax(-1)
            rows.append(torch.cat([p_V[self.target_id_D], p_V[self.draft_id_V < 0].sum()[None]]))
            ids.append(int(torch.multinomial(p_V, 1)))
            aux.append(aux_11F)
        aux.append(torch.zeros_like(aux[-1]))  # of the last token, which nothing follows
        first, ids_1T = len(prompt.token_ids), torch.tensor([ids])
        chains = unroll(
            self.draft,
            token_ids_BT=ids_1T,
            aux_BT3H=torch.cat(aux, 1).to(target.kv_dtype).float(),
            embedding_VH=self.embedding_VH,
            num_steps=LEVELS,
        )
        label_A = self.draft_id_V[ids_1T[0, first:]]
        label_A = torch.where(label_A < 0, len(self.target_id_D), label_A)
        return Sample(domain=prompt.domain, first=first, p_AD=torch.stack(rows), label_A=label_A, chains=chains)

    def logq(self, hidden: Tensor) -> Tensor:
        """The draft's log-probabilities [..., D] from its hidden states [..., H]."""
        return (self.draft.compute_logits(hidden) / self.temperature).log_softmax(-1)

    def logq_by_level(self, sample: Sample) -> Tensor:
        """The draft's log-probabilities [K, A, D] along the answer: index [k, a] is of token a on level k."""
        return self.logq(sample.chains.hidden_KBTH[:, 0, sample.first - 1 : -1])

    def count_accepted(self, sample: Sample, *, width: int, e_AD: Tensor | None = None, tau: float = 1.0) -> Tensor:
        """Accepted tokens of a tree at every root if the best n nodes are kept, n = 1 … N: [N, R].

        e_AD: the noise's E, for rule S. None: rule M.
        """
        R, first = len(sample.label_A) - LEVELS + 1, sample.first
        hidden_RWH = sample.chains.hidden_KBTH[0, 0, first - 1 : first - 1 + R, None]
        path_RWL, score_RW1, passed_RW1 = torch.zeros(R, 1, 0).long(), torch.zeros(R, 1, 1), torch.ones(R, 1, 1).bool()
        scores, passed = [], []
        for level in range(LEVELS):
            if level:
                Q = path_RWL.shape[0] * path_RWL.shape[1]
                hidden_RWH = unroll_rounds(
                    self.draft,
                    sample.chains,
                    row_Q=torch.zeros(Q).long(),
                    root_Q=torch.arange(first - 1, first - 1 + R).repeat_interleave(path_RWL.shape[1]),
                    proposal_QK=torch.nn.functional.pad(path_RWL.view(Q, level), (0, 1)),
                    embedding_VH=self.embedding_VH,
                )[:, level].view(R, -1, hidden_RWH.shape[-1])
            value_RWD = self.logq(hidden_RWH)
            if e_AD is not None:
                value_RWD = value_RWD - e_AD[level : level + R, None].log()
            value_RWD = value_RWD / tau
            best = value_RWD.topk(width)
            logp_RWC = (best.values - value_RWD.logsumexp(-1, keepdim=True)).clamp_max(0)
            hit_RWC = best.indices == sample.label_A[level : level + R, None, None]
            scores.append((score_RW1 + logp_RWC).flatten(1))
            passed.append((passed_RW1 & hit_RWC).flatten(1))
            token_RWC = self.target_id_D[best.indices]
            longer_RWCL = torch.cat([path_RWL[:, :, None].expand(-1, -1, width, -1), token_RWC[..., None]], -1)
            kept_RW = scores[-1].topk(width).indices
            path_RWL = longer_RWCL.flatten(1, 2).gather(1, kept_RW[..., None].expand(-1, -1, level + 1))
            score_RW1, passed_RW1 = scores[-1].gather(1, kept_RW)[..., None], passed[-1].gather(1, kept_RW)[..., None]
        # A parent scores at least as much as its child and comes before it, so the best nodes include every parent.
        order_RN = torch.cat(scores, 1).argsort(dim=1, descending=True, stable=True)
        return torch.cat(passed, 1).gather(1, order_RN).cumsum(1).T


def first_level(models: Models, sample: Sample, *, noises: int) -> dict[str, tuple[float, float]]:
    """By rule and width: the acceptance of the first level, summed over the answer's positions; and their number."""
    q_AD, p_AD = models.logq_by_level(sample)[0].exp(), sample.p_AD
    matched_W = p_AD.gather(1, q_AD.topk(max(WIDTHS)).indices).sum(0).cumsum(0)
    shared_W = torch.zeros(max(WIDTHS))
    for _ in range(noises):
        e_AD = torch.empty_like(p_AD).exponential_()
        own_A1 = (p_AD / e_AD).argmax(-1, keepdim=True)
        shared_W += ((q_AD / e_AD[:, :-1]).topk(max(WIDTHS)).indices == own_A1).sum(0).cumsum(0) / noises
    found = {"R": float(torch.minimum(p_AD[:, :-1], q_AD).sum())}
    for width in WIDTHS:
        found |= {f"M, width {width}": float(matched_W[width - 1]), f"S, width {width}": float(shared_W[width - 1])}
    return {rule: (total, len(p_AD)) for rule, total in found.items()}


def posterior_noise(sample: Sample) -> Tensor:
    """A draw of E [A, D] given that the target's tokens are the answer's."""
    m_A1, own_A1 = torch.empty(len(sample.p_AD), 1).exponential_(), sample.label_A[:, None]
    e_AD = torch.empty_like(sample.p_AD).exponential_() + sample.p_AD * m_A1
    return e_AD.scatter(1, own_A1, sample.p_AD.gather(1, own_A1) * m_A1)[:, :-1].clamp_min(1e-30)


def predictions(models: Models, sample: Sample) -> tuple[Tensor, Tensor]:
    """For the first level's children: predicted probabilities by tau [U, N, W], and what was accepted [N, W].

    N: a few noises for each position.
    """
    logq_AD, predicted, accepted = models.logq_by_level(sample)[0], [], []
    for _ in range(SCORED_NOISES):
        value_AD = logq_AD - posterior_noise(sample).log()
        best = value_AD.topk(max(WIDTHS))
        accepted.append(best.indices == sample.label_A[:, None])
        logp = [best.values / tau - (value_AD / tau).logsumexp(-1, keepdim=True) for tau in models.taus]
        predicted.append(torch.stack(logp).exp())
    return torch.cat(predicted, 1), torch.cat(accepted)


def walk(reach_RK: Tensor) -> tuple[float, float]:
    """Expected tokens and rounds along an answer, if round follows round from its first root on.

    reach_RK: the probability that a round accepts more than k proposals.
    """
    begins = [1.0] + [0.0] * sum(reach_RK.shape)
    tokens = rounds = 0.0
    for root, reach_K in enumerate(reach_RK.tolist()):
        rounds += begins[root]
        for count, (now, after) in enumerate(itertools.pairwise([1.0, *reach_K, 0.0]), start=1):
            tokens += begins[root] * now
            begins[root + count] += begins[root] * (now - after)
    return tokens, rounds


def walk_rules(models: Models, sample: Sample, *, noises: int, best_tau: float) -> dict[str, tuple[float, float]]:
    """Tokens and rounds by rule, summed over the noises: of chains by depth, of trees by width and nodes."""
    R, label_A, D = len(sample.label_A) - LEVELS + 1, sample.label_A, sample.p_AD.shape[1] - 1
    q_KA = models.logq_by_level(sample).exp().gather(2, label_A.clamp_max(D - 1).expand(LEVELS, -1)[..., None])[..., 0]
    ratio_KA = (q_KA / sample.p_AD.gather(1, label_A[:, None])[:, 0]).clamp_max(1) * (label_A < D)
    reach_RK = torch.stack([ratio_KA[level, level : level + R] for level in range(LEVELS)], 1).cumprod(1)
    walks = {f"R, chain of {depth}": walk(reach_RK[:, :depth]) for depth in range(1, LEVELS + 1)}
    drawn = [posterior_noise(sample) for _ in range(noises)]
    runs: list[tuple[str, int, Tensor | None, float]] = [("M", width, None, 1.0) for width in WIDTHS]
    runs += [("S", width, e_AD, best_tau) for width in WIDTHS for e_AD in drawn]
    runs += [("S", max(WIDTHS), drawn[0], tau) for tau in models.taus if tau != best_tau]
    for rule, width, e_AD, tau in runs:
        accepted_NR = models.count_accepted(sample, width=width, e_AD=e_AD, tau=tau)
        for nodes in range(1, LEVELS + 1) if width == 1 else NODES:
            shape = f"chain of {nodes}" if width == 1 else f"width {width}, {nodes} nodes"
            name = f"{rule}, {shape}" + f", tau {tau:g}" * (rule == "S" and tau != best_tau)
            reach_RK = (accepted_NR[nodes - 1][:, None] > torch.arange(min(nodes, LEVELS))).float()
            before, now = walks.get(name, (0.0, 0.0)), walk(reach_RK)
            walks[name] = (before[0] + now[0], before[1] + now[1])
    return walks


def ratios(title: str, domains: list[str], found: list[dict[str, tuple[float, float]]]) -> Table:
    """A row for each rule: Σ a / Σ b over a domain's answers, and over all, there with the standard error."""
    columns = list(dict.fromkeys(domains))
    table = Table("rule", *(f"{column} ({domains.count(column)})" for column in columns), "all", "±", title=title)
    for rule in found[0]:
        a_S, b_S = torch.tensor([each[rule] for each in found], dtype=torch.float64).T
        of = [torch.tensor([domain == column for domain in domains]) for column in columns]
        ratio = a_S.sum() / b_S.sum()
        error = (a_S - ratio * b_S).square().sum().sqrt() / b_S.sum()
        table.add_row(
            rule, *(f"{value:.3f}" for value in [*(a_S[at].sum() / b_S[at].sum() for at in of), ratio, error])
        )
    return table


def prediction_tables(taus: Sequence[float], predicted_UNW: Tensor, accepted_NW: Tensor) -> tuple[float, list[Table]]:
    """The tau with the smallest log loss; a table of all, and a table of bins for that one."""
    groups, hit_NW = {"child 1": slice(0, 1), "children 2–4": slice(1, None)}, accepted_NW.float()
    p_UNW = predicted_UNW.clamp(1e-6, 1 - 1e-6)
    loss_UNW = -torch.where(accepted_NW, p_UNW, 1 - p_UNW).log()
    best = int(loss_UNW.mean((1, 2)).argmin())
    columns = [f"{group}: {what}" for group in groups for what in ("{}", "predicted", "observed")]
    by_tau = Table("tau", *(c.format("log loss") for c in columns), title="S: predicted acceptance of the first level")
    by_bin = Table("predicted", *(c.format("number") for c in columns), title=f"S: the same with tau {taus[best]:g}")
    for tau, p_NW, loss_NW in zip(taus, p_UNW, loss_UNW, strict=True):
        means = [x_NW[:, group].mean() for group in groups.values() for x_NW in (loss_NW, p_NW, hit_NW)]
        by_tau.add_row(f"{tau:g}", *(f"{mean:.3f}" for mean in means))
    for low, high in itertools.pairwise(BINS):
        row = [f"{low:g} to {high:g}"]
        for group in groups.values():
            p, hit = p_UNW[best][:, group], hit_NW[:, group]
            inside = (p >= low) & (p < high)
            row += [f"{int(inside.sum()):,}", f"{p[inside].mean():.3f}", f"{hit[inside].mean():.3f}"]
        by_bin.add_row(*row)
    return taus[best], [by_tau, by_bin]


def draft_ids(target_id_D: Tensor, *, vocab_size: int) -> Tensor:
    """The draft's id of each of the target's tokens [V], −1 where it has none."""
    none_V = torch.full((vocab_size,), -1, dtype=torch.int64)
    return none_V.scatter(0, target_id_D, torch.arange(len(target_id_D)))


@torch.inference_mode()
def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=12, help="prompts taken from each file")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.7, 1.0])
    parser.add_argument("--taus", nargs="+", type=float, default=[0.5, 0.7, 1.0, 1.5, 2.0])
    parser.add_argument("--noises", type=int, default=64, help="of each position, for the first level")
    parser.add_argument("--round-noises", type=int, default=2, help="of each answer, for whole rounds")
    parser.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    arguments = parser.parse_args()
    config = load_config(None, arguments.overrides)
    use_threads(config.engine.threads)
    tokenizer, target = load_tokenizer(config), load_serving_target(config)
    loaded, _ = starting_draft(config, target)
    if loaded is None:
        parser.error("no draft to measure: name one with draft.checkpoint=, and leave engine.speculate on")
    draft = prepare_draft(loaded, target, capacity=config.engine.max_seq_len).draft
    prompts = load_prompts(arguments.prompts, limit=arguments.limit, tokenizer=tokenizer, max_prompt_tokens=512)
    console = Console(width=120)
    for temperature in arguments.temperatures:
        torch.manual_seed(0)
        models = Models(
            target=target,
            draft=draft,
            embedding_VH=target.embedding_rows(),
            target_id_D=draft.draft_token_ids,
            draft_id_V=draft_ids(draft.draft_token_ids, vocab_size=target.vocab_size),
            eos=eos_token_ids(target, tokenizer),
            temperature=temperature,
            taus=arguments.taus,
        )
        samples = [models.sample(prompt, max_tokens=arguments.max_tokens) for prompt in prompts]
        samples = [sample for sample in samples if len(sample.label_A) >= LEVELS]
        domains = [sample.domain for sample in samples]
        rates = [first_level(models, sample, noises=arguments.noises) for sample in samples]
        console.print(ratios(f"temperature {temperature:g}: acceptance of the first level", domains, rates))
        predicted, accepted = zip(*(predictions(models, sample) for sample in samples), strict=True)
        best_tau, tables = prediction_tables(models.taus, torch.cat(predicted, 1), torch.cat(accepted))
        console.print(*tables, sep="\n")
        walks = [walk_rules(models, s, noises=arguments.round_noises, best_tau=best_tau) for s in samples]
        title = f"temperature {temperature:g}: accepted length; tau {best_tau:g} where none is named"
        console.print(ratios(title, domains, walks))


if __name__ == "__main__":
    main()
