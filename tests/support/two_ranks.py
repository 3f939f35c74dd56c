"""Two ranks that share one tiny sharded target, without a server. They are forked from a process that has imported it.

    results = run_cases(folder, [Case(name="tp", model=folder / "llama", strategy="tensor_parallel")])
    results["tp"][1]["versions"]        # from the report of rank 1

A case runs an engine with a draft on rank 0 and swaps the draft between two rounds.
"""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aurora_lit.ipc.process_lifetime import die_with_parent
from support.fork_host import fork

PROMPTS = (
    (3, 14, 15, 9, 2, 6),
    (5, 35, 8, 9),
    (7, 9, 3, 2, 38, 4, 6, 2, 6, 4, 3, 3),
    (*range(20, 60), 5),
    (*range(20, 60), 6, 7),
)
LATER_PROMPTS = ((*range(60), *range(10, 20), 1), tuple(range(60, -1, -1)), (*range(60), *range(10, 20), 2))
"""One after the other in one slot: the third finds in the store what the first has left there."""
MAX_TOKENS = 12
SWAP_AT_ROUND = 4
SHAPE: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
"""Three key-value heads, which two ranks cannot divide evenly, as in SmolLM2."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the two ranks do."""

    name: str
    model: str
    strategy: str
    precision: str = "fp32"
    native: bool = True
    """False: without the CPU kernels."""
    fault: str = ""
    """"dies": rank 1 exits between two orders; "miscounts": rank 1 counts one draft version too many."""


def run_cases(folder: Path, cases: list[Case]) -> dict[str, list[dict[str, Any]]]:
    """The two ranks' reports, by name of the case."""
    log = folder / "log"
    arguments = [str(folder), [asdict(case) for case in cases]]
    process = fork("support.two_ranks", "run_forked", arguments, stdout=log, stderr=log)
    assert process.wait(200) == 0, log.read_text()
    return {
        case.name: [json.loads((folder / f"{case.name}-{rank}.json").read_text()) for rank in range(2)]
        for case in cases
    }


def run_rank(rank: int, case: Case, folder: Path) -> dict[str, Any]:
    """Run one rank of a case; returns its report."""
    import torch

    from aurora_lit.distributed import Op, Order, Ranks
    from aurora_lit.errors import AuroraError, RankError
    from aurora_lit.kernels import native
    from aurora_lit.models.sharded_target import read_shard
    from support.tiny_models import make_engine, random_draft, request, run

    torch.set_num_threads(1)
    if not case.native:
        native.library = lambda: None  # type: ignore[assignment]
    meeting = folder / f"{case.name}-meeting"
    meeting.mkdir(exist_ok=True)
    ranks = Ranks(rank=rank, size=2, folder=meeting, strategy=case.strategy)  # type: ignore[arg-type]
    try:
        target = read_shard(
            Path(case.model),
            precision=case.precision,
            strategy=case.strategy,
            ranks=ranks,  # type: ignore[arg-type]
        )
    except AuroraError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    report: dict[str, Any] = {"versions": [], "weights": num_weights(target)}
    report["kv_heads"] = target.num_kv_heads, target.all_kv_heads
    if rank:

        def record(order: Order) -> None:
            report["versions"].append(f"{order.op.name} {order.version}")
            if len(report["versions"]) == 8 and case.fault:
                if case.fault == "dies":
                    os._exit(9)
                ranks.num_versions += 1

        try:
            target.run_worker_loop(after=record)
        except RankError as error:
            report["error"] = str(error)
        return report

    send_order = ranks._send

    def send(op: Op, tensors: tuple[Any, ...]) -> None:
        send_order(op, tensors)
        version = "".join(map(chr, tensors[0].tolist())) if op is Op.VERSION else ranks.version
        report["versions"].append(f"{op.name} {version}")

    ranks._send = send  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            embeds = target.embedding(torch.arange(1500).view(30, 50) % target.vocab_size)
            report |= {"embeds": embeds.tolist(), "embeds_type": str(embeds.dtype)}
        engine = make_engine(target, random_draft(target), max_draft_tokens=3)
        for i, prompt in enumerate(PROMPTS):
            engine.submit(request(str(i), prompt, max_tokens=MAX_TOKENS))
        tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
        proposed = rounds = 0
        while engine.has_work:
            if rounds == SWAP_AT_ROUND:
                engine.swap_draft(random_draft(target, seed=5), version="draft-000001")
            ranks.announce(engine.draft_version)
            for output in engine.round():
                tokens[output.request_id] += output.token_ids
                proposed += output.num_proposed
            rounds += 1
        report |= {"tokens": list(tokens.values()), "proposed": proposed, "cached": engine.counters.cached_tokens}
        version, later = engine.draft_version, LATER_PROMPTS
        engine = make_engine(target, random_draft(target), max_batch_size=1, draft_version=version)
        answers = [run(engine, [request("a", prompt, max_tokens=MAX_TOKENS)])["a"].token_ids for prompt in later]
        report |= {"later_tokens": answers, "later_cached": engine.counters.cached_tokens}
        ranks.stop()
    except RankError as error:
        report["error"] = str(error)
    return report


def num_weights(target: Any) -> int:
    """Number of weights on this rank: its parts of parameters, including packed linear layers."""
    from torch.distributed.tensor import DTensor

    from aurora_lit.kernels.packed_linear import PackedLinear

    whole = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in target.parameters())
    packed = [m for m in target.modules() if isinstance(m, PackedLinear)]
    return int(whole + sum(m.out_features * m.in_features for m in packed))


def run_forked(folder: str, cases: list[dict[str, Any]]) -> None:
    """Run both ranks of each case, two cases at a time, as ranks mostly wait; their reports are files in `folder`."""
    running: list[tuple[str, list[int]]] = []
    for case in cases:
        if len(running) == 2:
            _wait_for(Path(folder), *running.pop(0))
        running.append((case["name"], _start(Path(folder), Case(**case))))
    for each in running:
        _wait_for(Path(folder), *each)


def _start(folder: Path, case: Case) -> list[int]:
    """Fork both ranks; their process ids."""
    children = []
    parent = os.getpid()
    for rank in range(2):
        child = os.fork()
        if child == 0:
            die_with_parent(parent)
            code = 1
            try:
                report = run_rank(rank, case, folder)
                (folder / f"{case.name}-{rank}.json").write_text(json.dumps(report))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    return children


def _wait_for(folder: Path, name: str, children: list[int]) -> None:
    for rank, child in enumerate(children):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            (folder / f"{name}-{rank}.json").write_text(json.dumps({"exit": code}))
