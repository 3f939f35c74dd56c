"""The trace: one segment of one request, with the target's states and the rounds that produced it.

The engine makes traces, ring and log carry them, learning reads them. Their bytes are in safetensors format, so nothing
is unpickled; `from_bytes` validates everything that readers rely on, except that token ids are within the vocabulary,
whose size it does not know.

Leaves out making traces (serve/engine/trace_recorder.py, learn/pretrain/), carrying them (ipc/ring.py, traces/log.py)
and batches (learn/data/).

Shapes: T positions, H target hidden size, R rounds, K proposals of the longest round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from aurora_lit.errors import TraceError
from aurora_lit.request import Source

VERIFY_MODES = ("greedy", "sampled", "read")
"""How the target chose the tokens, to which proposals had to be equal: by argmax, by argmax of logit / temperature plus
noise (modules/sampling/choice.py), or not at all because they are given text."""

SEGMENT_TOKENS = 512
"""New tokens after which a running request hands over a trace instead of waiting for its end."""
OVERLAP_TOKENS = 64
"""Tokens of the previous segment that a later segment repeats, as context for the draft."""


def _empty(dtype: torch.dtype, *shape: int) -> Any:
    return field(default_factory=lambda: torch.zeros(shape, dtype=dtype))


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """A segment, and the rounds whose root is in it. A round's root is the last committed token when it began.

    The target's distribution at proposal i <= accepted of a round is softmax(head(last_TH[root + i])). This is exact,
    so no top-k log-probabilities are stored. The target's own token after the accepted proposals is
    `token_ids_T[root + 1 + accepted]` if the segment contains that index; a request's last token is not in any segment,
    since the target never ran it.

    >>> from_bytes(to_bytes(trace)).domain == trace.domain
    """

    request_id: str = ""
    domain: str = ""
    """The client's label (`metadata.aurora_domain`) or the prompt file's; "" if unknown."""
    served_domain: str = ""
    """The domain that the engine served it as: the label, else what it assigned the prompt by published centroids. The
    learner, whose clusters are newer, decides by `domain` and the prompt."""
    client: str = ""
    """Pseudonym of the client or its address (serve/http/routes.py); "" if unknown."""
    verify: str = "read"
    """One of VERIFY_MODES."""
    temperature: float = 0.0
    """The request's sampling temperature."""
    first_position: int = 0
    """Position in the request of token_ids_T[0]."""
    prompt_length: int = 0
    """Tokens of the request's prompt; 0 if unknown."""
    answer_start: int
    """Index in the segment of the first generated token that no earlier segment contains; T if there is none."""
    token_ids_T: Tensor
    """int32."""
    aux_T3H: Tensor
    """bf16. The three auxiliary hidden states, concatenated."""
    last_TH: Tensor
    """bf16. The last hidden state, input of the target's head, which gives the logits for the next token. 0 at those
    positions of a prompt that no generated token follows, but for pretraining: the engine needs no logits there, and
    computes no state."""
    lse_T: Tensor | None = None
    """fp32. Log-sum-exp of those logits over the whole vocabulary; None if not computed yet, which needs the head."""
    round_root_R: Tensor = _empty(torch.int32, 0)
    """int32, ascending. Index of the root; proposal i is for index root + 1 + i."""
    round_version_R: Tensor = _empty(torch.int32, 0)
    """int32. The draft that proposed: 42 for draft-000042, 0 for the starting draft, -1 for none."""
    num_proposed_R: Tensor = _empty(torch.int32, 0)
    """int32. Number of proposals, without those beyond the request's end. Where a chain was weighed: of the draft's
    first choices of which the answer tells whether they were right, proposed or not."""
    num_accepted_R: Tensor = _empty(torch.int32, 0)
    """int32. Number of proposals accepted and committed, without the target's own token after them; of first choices
    that were not proposed, those that are this token are counted."""
    source_R: Tensor = _empty(torch.uint8, 0)
    """uint8. Where the proposals came from, a `Source` up to MEMORY: DRAFT maybe with copies beside the draft's, NGRAM
    also where a grammar forced them."""
    proposal_RK: Tensor = _empty(torch.int32, 0, 0)
    """int32. Proposed tokens, as target ids; -1 beyond num_proposed."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in _tensors(self).values())

    def copy(self) -> Trace:
        """A copy with its own memory."""
        tensors: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(self).items()}
        return replace(self, **tensors)


class RoundNote(NamedTuple):
    """One round of one sequence, as a trace records it."""

    root: int
    """Position of the last committed token when the round began."""
    version: int
    """The draft's version; -1 if the draft proposed nothing."""
    source: Source
    """Where the proposals come from; what a grammar forces counts as NGRAM."""
    proposals: list[int]
    """Without those that the end of the request cut off. Of copies, only up to the first rejected one. Of a weighed
    chain the first choices that the answer tells about, some of which may not have been proposed."""
    accepted: int


def round_tensors(notes: Sequence[RoundNote], *, first: int) -> dict[str, Any]:
    """The fields of a trace that describe its rounds.

    `first`: position of the trace's first token.
    """
    count, widest = len(notes), max((len(note.proposals) for note in notes), default=0)
    padding = [-1] * widest
    per_round: dict[str, tuple[list[Any], type[np.generic]]] = {
        "round_root_R": ([note.root - first for note in notes], np.int32),
        "round_version_R": ([note.version for note in notes], np.int32),
        "num_proposed_R": ([len(note.proposals) for note in notes], np.int32),
        "num_accepted_R": ([note.accepted for note in notes], np.int32),
        "source_R": ([note.source for note in notes], np.uint8),
    }
    proposal_RK = np.array([(note.proposals + padding)[:widest] for note in notes], dtype=np.int32)
    # numpy arrays are made from lists in a fraction of the time that torch.tensor takes.
    tensors = {name: torch.from_numpy(np.array(values, dtype=dtype)) for name, (values, dtype) in per_round.items()}
    return {**tensors, "proposal_RK": torch.from_numpy(proposal_RK.reshape(count, widest))}


_TENSOR_FIELDS: dict[str, tuple[torch.dtype, tuple[str, ...]]] = {
    "token_ids_T": (torch.int32, ("T",)),
    "aux_T3H": (torch.bfloat16, ("T", "3H")),
    "last_TH": (torch.bfloat16, ("T", "H")),
    "lse_T": (torch.float32, ("T",)),
    "round_root_R": (torch.int32, ("R",)),
    "round_version_R": (torch.int32, ("R",)),
    "num_proposed_R": (torch.int32, ("R",)),
    "num_accepted_R": (torch.int32, ("R",)),
    "source_R": (torch.uint8, ("R",)),
    "proposal_RK": (torch.int32, ("R", "K")),
}
"""Type and shape of each tensor field."""
ROUND_FIELDS = tuple(name for name, (_, axes) in _TENSOR_FIELDS.items() if axes[0] == "R")
"""The tensor fields with one entry a round."""
_PLAIN_FIELDS = {
    "request_id": str,
    "domain": str,
    "served_domain": str,
    "client": str,
    "verify": str,
    "temperature": float,
    "first_position": int,
    "prompt_length": int,
    "answer_start": int,
}
"""Type of each other field."""
_PLAIN_NAME = "about"
"""Name of the uint8 tensor that holds the plain fields as JSON."""

LAYOUT_DIGEST = hashlib.sha256(
    repr(
        [(name, str(dtype)) for name, (dtype, _) in _TENSOR_FIELDS.items()]
        + [(name, str(kind)) for name, kind in _PLAIN_FIELDS.items()]
        + [VERIFY_MODES]
    ).encode()
).hexdigest()[:16]
"""Changes with any field's name or type, and with VERIFY_MODES; a ring of another layout is not read."""

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors."""


def to_bytes(trace: Trace) -> bytes:
    """The trace as safetensors."""
    return b"".join(to_pieces(trace))


def to_pieces(trace: Trace) -> list[bytes | memoryview]:
    """The same bytes in pieces (`tensor_pieces`)."""
    plain = json.dumps({name: getattr(trace, name) for name in _PLAIN_FIELDS}).encode()
    return tensor_pieces({**_tensors(trace), _PLAIN_NAME: torch.frombuffer(bytearray(plain), dtype=torch.uint8)})


def tensor_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """Tensors on the CPU as safetensors bytes in pieces: a header, then each tensor's own memory, without a copy.

    Tensors with larger elements come first, so that each is aligned.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    pieces, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        piece = _memory(tensor)
        offsets = [end, end + len(piece)]
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        pieces.append(piece)
        end += len(piece)
    header_json = json.dumps(header).encode()
    header_json += b" " * (-len(header_json) % 8)
    return [len(header_json).to_bytes(8, "little") + header_json, *pieces]


def _memory(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    numbers = tensor.contiguous()
    # numpy has no bf16.
    array: Any = (numbers.view(torch.int16) if numbers.dtype == torch.bfloat16 else numbers).numpy()
    return memoryview(array).cast("B")


def from_bytes(data: bytes | bytearray | memoryview) -> Trace:
    """The trace that `to_bytes` wrote. Raises TraceError for anything else, including values out of range."""
    try:
        tensors = safetensors.torch.load(bytes(data))
        plain: Any = json.loads(bytes(tensors.pop(_PLAIN_NAME).tolist()))
    except Exception as error:  # noqa: BLE001  (malformed bytes make safetensors fail in many ways)
        raise TraceError(f"not a trace: {error!r}") from error
    _require(isinstance(plain, dict) and plain.keys() == _PLAIN_FIELDS.keys(), "its plain fields differ")
    for name, kind in _PLAIN_FIELDS.items():
        value = plain[name]
        if kind is float and isinstance(value, int) and abs(value) < 1 << 53:
            value = float(value)
        _require(type(value) is kind, f"{name} is {value!r}")
        plain[name] = value
    _require(tensors.keys() | {"lse_T"} == _TENSOR_FIELDS.keys(), f"it has tensors {sorted(tensors)}")
    fields: dict[str, Any] = {**plain, **tensors}
    trace = Trace(**fields)
    check(trace)
    return trace


def check(trace: Trace) -> None:
    """Raise TraceError if a field has a wrong type or shape, or an impossible value."""
    tensors = _tensors(trace)
    # Without _require, which would have every tensor's message written for every trace.
    for name, tensor in tensors.items():
        dtype, axes = _TENSOR_FIELDS[name]
        if tensor.dtype != dtype:
            raise _not_a_trace(f"{name} is {tensor.dtype}, not {dtype}")
        if tensor.dim() != len(axes):
            raise _not_a_trace(f"{name} has shape {tuple(tensor.shape)}")
    T, R = len(trace.token_ids_T), len(trace.round_root_R)
    H, K = trace.last_TH.shape[1], trace.proposal_RK.shape[1]
    sizes = {"T": T, "R": R, "H": H, "3H": 3 * H, "K": K}
    for name, tensor in tensors.items():
        shape = tuple(sizes[axis] for axis in _TENSOR_FIELDS[name][1])
        if tensor.shape != shape:
            raise _not_a_trace(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    _require(T > 0, "it has no tokens")
    _require(trace.verify in VERIFY_MODES, f"verify is {trace.verify!r}")
    _require(0 <= trace.answer_start <= T, f"answer_start is {trace.answer_start} of {T}")
    _require(trace.first_position >= 0, f"first_position is {trace.first_position}")
    _require(trace.prompt_length >= 0, f"prompt_length is {trace.prompt_length}")
    _require(0 <= trace.temperature < float("inf"), f"temperature is {trace.temperature}")
    _require(int(trace.token_ids_T.min()) >= 0, "a token id is negative")
    for name in ("aux_T3H", "last_TH", "lse_T"):
        if name in tensors and not _is_finite(tensors[name]):
            raise _not_a_trace(f"{name} is not finite")
    if R:
        _check_rounds(trace, T=T, K=K)


def _check_rounds(trace: Trace, *, T: int, K: int) -> None:
    # numpy, since torch takes five times as long for so few numbers.
    root_R, proposed_R, accepted_R, proposal_RK = (
        tensor.numpy() for tensor in (trace.round_root_R, trace.num_proposed_R, trace.num_accepted_R, trace.proposal_RK)
    )
    _require(bool((proposed_R >= 0).all() and (proposed_R <= K).all()), "num_proposed is out of range")
    _require(bool((accepted_R >= 0).all() and (accepted_R <= proposed_R).all()), "num_accepted is out of range")
    _require(bool((root_R[1:] > root_R[:-1]).all()), "round_root does not ascend")
    last_R = root_R.astype(np.int64) + np.minimum(accepted_R, np.maximum(proposed_R - 1, 0))
    _require(bool((root_R >= 0).all() and (last_R < T).all()), "round_root is out of range")
    _require(int(trace.source_R.max()) <= Source.MEMORY, "source is unknown")
    place_K = np.arange(K)
    inside_RK = place_K < proposed_R[:, None]
    _require(bool(((proposal_RK >= 0) == inside_RK).all()), "proposal is negative, or not -1 beyond num_proposed")
    index_RK = root_R[:, None] + 1 + place_K
    accepted_RK = (place_K < accepted_R[:, None]) & (index_RK < T)
    token_RK = trace.token_ids_T.numpy()[np.minimum(index_RK, T - 1)]
    _require(bool((token_RK == proposal_RK)[accepted_RK].all()), "an accepted proposal is not the token there")


def _is_finite(tensor: Tensor) -> bool:
    """True if every number is; of bf16 by bits, in a fifth of a sum's time."""
    if not tensor.numel():
        return True
    if tensor.dtype != torch.bfloat16:
        return bool(tensor.sum(dtype=torch.float32).isfinite())  # needs no second tensor
    bits: npt.NDArray[np.int16] = tensor.contiguous().view(torch.int16).numpy()
    # Infinity and NaN are the largest of the positive numbers, and of the negative ones as unsigned numbers.
    return bool(bits.max() < 0x7F80 and bits.view(np.uint16).max() < 0xFF80)


def _tensors(trace: Trace) -> dict[str, Tensor]:
    return {name: tensor for name in _TENSOR_FIELDS if (tensor := getattr(trace, name)) is not None}


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _not_a_trace(reason)


def _not_a_trace(reason: str) -> TraceError:
    return TraceError(f"not a trace of this version: {reason}")
