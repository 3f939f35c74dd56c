"""The trace: one segment of one request as the target saw it. The engine writes it, ring and log carry it, learning
reads it.

Bytes are safetensors, so nothing that crossed a process or a disk is ever unpickled; `from_bytes` checks everything
that a reader relies on, except that token ids lie in the vocabulary, which it does not know. What is left out: who
makes traces (serve/engine/trace_recorder.py, learn/pretrain/label_text.py), what carries them (ipc/ring.py, traces/log.py), batches (learn/).

Shapes: T positions, H target hidden, R rounds, K proposals of the widest round, N rejected positions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from aurora_lit.errors import TraceError

VERIFY_MODES = ("greedy", "seeded", "free", "read")
"""How the tokens came about: argmax, a draw fixed by the seed, the ratio test min(1, p/q), or not at all (text)."""

SOURCE_NOBODY, SOURCE_DRAFT, SOURCE_LOOKUP = 0, 1, 2


def _none_of(dtype: torch.dtype, *shape: int) -> Any:
    return field(default_factory=lambda: torch.zeros(shape, dtype=dtype))


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """A segment, and the rounds whose root lies in it. A root is the last committed token when its round began.

    The target's distribution at proposal i of a round is softmax(head(last)), where last is `last_TH[root + i]` for
    i <= accepted, else the round's row i - accepted - 1 of `rejected_last_NH`. It is exact, so no top-k is stored. The
    corrected or bonus token is `token_ids_T[root + 1 + accepted]`, if the segment reaches so far: the last token of a
    request is not part of it, since the target never ran it.

    >>> from_bytes(to_bytes(trace)).domain == trace.domain
    """

    request_id: str = ""
    domain: str = ""
    """The client's label (`metadata.aurora_domain`) or the prompt file's; "" when unknown."""
    client: str = ""
    """Tells clients apart without saying who they are (serve/http/client_names.py); "" when unknown."""
    verify: str = "read"
    """One of VERIFY_MODES."""
    temperature: float = 0.0
    """The request's."""
    first_position: int = 0
    """Place in the request of token_ids_T[0]."""
    answer_start: int
    """First index into the segment of generated tokens that no earlier segment taught; T when there are none."""
    token_ids_T: Tensor
    """int32."""
    aux_T3H: Tensor
    """bf16. The three auxiliary hidden states, side by side."""
    last_TH: Tensor
    """bf16. What the target's head sees; times the head it gives the logits for the next token."""
    lse_T: Tensor | None = None
    """fp32. Log-sum-exp of those logits over the whole vocabulary; None until someone with the head has computed it."""
    round_root_R: Tensor = _none_of(torch.int32, 0)
    """int32, ascending. Index of the root; proposal i stands for index root + 1 + i."""
    round_version_R: Tensor = _none_of(torch.int32, 0)
    """int32. Draft that proposed: 42 for draft-000042, 0 for the one that serving began with, -1 for none."""
    num_proposed_R: Tensor = _none_of(torch.int32, 0)
    """int32. Proposals that a request's end cut off are not counted."""
    num_accepted_R: Tensor = _none_of(torch.int32, 0)
    """int32. Proposals accepted and committed, the bonus or corrected token not counted."""
    source_R: Tensor = _none_of(torch.uint8, 0)
    """uint8. Who proposed: SOURCE_NOBODY, SOURCE_DRAFT or SOURCE_LOOKUP."""
    explored_R: Tensor = _none_of(torch.bool, 0)
    """bool. The round drew its proposals at the exploration's temperature."""
    draft_temperature_R: Tensor = _none_of(torch.float32, 0)
    """fp32. What the draft's logits were divided by before proposals were drawn; 1 where they are the argmax."""
    proposal_RK: Tensor = _none_of(torch.int32, 0, 0)
    """int32 target ids; -1 beyond num_proposed."""
    behaviour_logprob_RK: Tensor = _none_of(torch.float32, 0, 0)
    """fp32. Log-probability of each proposal under the distribution it was drawn from; 0 for an argmax, NaN beyond
    num_proposed, for lookup, and where the request's options (top-k, top-p, min-p, penalties, bias) made its p another
    than the head's softmax at its temperature: such rounds teach by supervision only, no policy."""
    rejected_last_NH: Tensor = _none_of(torch.bfloat16, 0, 0)
    """bf16. Last hidden states behind first rejections, rounds in order. A round with n proposals and a accepted has
    those after its proposals a, a + 1, …, n - 2: n - 1 - a rows, if positive."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in _tensors(self).values())

    @property
    def num_rejected_R(self) -> Tensor:
        """Rows of `rejected_last_NH` that belong to each round, int64."""
        return (self.num_proposed_R.long() - 1 - self.num_accepted_R).clamp_min(0)

    def copy(self) -> Trace:
        """The same in memory of its own."""
        tensors: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(self).items()}
        return replace(self, **tensors)


_DTYPES = {
    "token_ids_T": torch.int32,
    "aux_T3H": torch.bfloat16,
    "last_TH": torch.bfloat16,
    "lse_T": torch.float32,
    "round_root_R": torch.int32,
    "round_version_R": torch.int32,
    "num_proposed_R": torch.int32,
    "num_accepted_R": torch.int32,
    "source_R": torch.uint8,
    "explored_R": torch.bool,
    "draft_temperature_R": torch.float32,
    "proposal_RK": torch.int32,
    "behaviour_logprob_RK": torch.float32,
    "rejected_last_NH": torch.bfloat16,
}
_PLAIN = {
    "request_id": str,
    "domain": str,
    "client": str,
    "verify": str,
    "temperature": float,
    "first_position": int,
    "answer_start": int,
}
_ABOUT = "about"
"""Name of the uint8 tensor that holds the plain fields as JSON."""

LAYOUT_DIGEST = hashlib.sha256(
    repr([(name, str(kind)) for name, kind in (*_DTYPES.items(), *_PLAIN.items())]).encode()
).hexdigest()[:16]
"""Changes with any field's name or type: a ring or log of another layout is not read."""


_NAMES_OF_DTYPES = {
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def to_bytes(trace: Trace) -> bytes:
    """The trace as safetensors."""
    return b"".join(to_pieces(trace))


def to_pieces(trace: Trace) -> list[bytes | memoryview]:
    """The same bytes in pieces: safetensors' header, then the tensors' own memory, wide numbers first, not copied."""
    plain = json.dumps({name: getattr(trace, name) for name in _PLAIN}).encode()
    tensors = sorted(_tensors(trace).items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {}
    pieces, end = [], 0
    for name, tensor in tensors:
        piece = _memory(tensor)
        header[name] = _entry(_NAMES_OF_DTYPES[tensor.dtype], list(tensor.shape), end, len(piece))
        pieces.append(piece)
        end += len(piece)
    header[_ABOUT] = _entry("U8", [len(plain)], end, len(plain))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces, plain]


def _memory(tensor: Tensor) -> memoryview:
    """A tensor's bytes, not copied."""
    if not tensor.numel():
        return memoryview(b"")
    numbers = tensor.contiguous()
    # numpy has no bf16.
    array: Any = (numbers.view(torch.int16) if numbers.dtype == torch.bfloat16 else numbers).numpy()
    return memoryview(array).cast("B")


def _entry(dtype: str, shape: list[int], start: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def from_bytes(data: bytes | bytearray | memoryview) -> Trace:
    """The trace that `to_bytes` wrote. Raises TraceError for anything else, a value out of its range included."""
    try:
        tensors = safetensors.torch.load(bytes(data))
        plain: Any = json.loads(bytes(tensors.pop(_ABOUT).tolist()))
    except Exception as error:  # noqa: BLE001  (malformed bytes make safetensors fail in many ways)
        raise TraceError(f"not a trace: {error!r}") from error
    _require(isinstance(plain, dict) and plain.keys() == _PLAIN.keys(), "its plain fields are others")
    for name, kind in _PLAIN.items():
        value = float(plain[name]) if kind is float and isinstance(plain[name], int) else plain[name]
        _require(type(value) is kind, f"{name} is {value!r}")
        plain[name] = value
    _require(tensors.keys() | {"lse_T"} == _DTYPES.keys(), f"it has tensors {sorted(tensors)}")
    fields: dict[str, Any] = {**plain, **tensors}
    trace = Trace(**fields)
    check(trace)
    return trace


def check(trace: Trace) -> None:
    """Raise TraceError when a field's type, shape or values cannot be."""
    tensors = _tensors(trace)
    for name, tensor in tensors.items():
        _require(tensor.dtype == _DTYPES[name], f"{name} is {tensor.dtype}, not {_DTYPES[name]}")
        dims = 2 if name.endswith(("_T3H", "_TH", "_RK", "_NH")) else 1
        _require(tensor.dim() == dims, f"{name} has shape {tuple(tensor.shape)}")
    T, R = len(trace.token_ids_T), len(trace.round_root_R)
    H, K = trace.last_TH.shape[1], trace.proposal_RK.shape[1]
    N = int(trace.num_rejected_R.sum())
    shapes = {
        "token_ids_T": (T,),
        "aux_T3H": (T, 3 * H),
        "last_TH": (T, H),
        "lse_T": (T,),
        "proposal_RK": (R, K),
        "behaviour_logprob_RK": (R, K),
        "rejected_last_NH": (N, H if N else trace.rejected_last_NH.shape[1]),
    }
    for name, tensor in tensors.items():
        shape = shapes.get(name, (R,))
        _require(tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    _require(T > 0, "it has no tokens")
    _require(trace.verify in VERIFY_MODES, f"verify is {trace.verify!r}")
    _require(0 <= trace.answer_start <= T, f"answer_start is {trace.answer_start} of {T}")
    _require(trace.first_position >= 0, f"first_position is {trace.first_position}")
    _require(0 <= trace.temperature < float("inf"), f"temperature is {trace.temperature}")
    _require(int(trace.token_ids_T.min()) >= 0, "a token id is negative")
    for name in ("aux_T3H", "last_TH", "lse_T", "draft_temperature_R", "rejected_last_NH"):
        if name in tensors:  # a sum is not finite when one number is not, and costs no second tensor
            _require(bool(tensors[name].sum(dtype=torch.float32).isfinite()), f"{name} is not finite")
    if R:
        _check_rounds(trace, T=T, K=K)


def _check_rounds(trace: Trace, *, T: int, K: int) -> None:
    root_R, proposed_R, accepted_R = trace.round_root_R.long(), trace.num_proposed_R.long(), trace.num_accepted_R.long()
    _require(bool((proposed_R >= 0).all() and (proposed_R <= K).all()), "num_proposed is out of range")
    _require(bool((accepted_R >= 0).all() and (accepted_R <= proposed_R).all()), "num_accepted is out of range")
    _require(bool((root_R[1:] > root_R[:-1]).all()), "round_root does not ascend")
    last_R = root_R + torch.minimum(accepted_R, (proposed_R - 1).clamp_min(0))
    _require(bool((root_R >= 0).all() and (last_R < T).all()), "round_root is out of range")
    _require(bool((trace.source_R <= SOURCE_LOOKUP).all()), "source is none of the known")
    _require(bool((trace.draft_temperature_R > 0).all()), "draft_temperature is not positive")
    place_K = torch.arange(K)
    inside_RK = place_K < proposed_R[:, None]
    _require(bool(((trace.proposal_RK >= 0) == inside_RK).all()), "proposal is negative, or not -1 beyond num_proposed")
    index_RK = root_R[:, None] + 1 + place_K
    accepted_RK = (place_K < accepted_R[:, None]) & (index_RK < T)
    token_RK = trace.token_ids_T[index_RK.clamp_max(T - 1)]
    _require(bool((token_RK == trace.proposal_RK)[accepted_RK].all()), "an accepted proposal is not the token there")
    logprob_RK = trace.behaviour_logprob_RK
    _require(
        bool((logprob_RK.isnan() | ((logprob_RK <= 1e-3) & logprob_RK.isfinite())).all()),
        "behaviour_logprob is no log-probability",
    )


def _tensors(trace: Trace) -> dict[str, Tensor]:
    return {name: tensor for name in _DTYPES if (tensor := getattr(trace, name)) is not None}


def _require(fine: bool, what: str) -> None:
    if not fine:
        raise TraceError(f"not a trace of this version: {what}")
