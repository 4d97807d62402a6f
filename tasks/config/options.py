"""The sections of the configuration, one model each; those of data: tasks/lamp/options.py."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tasks.record import OUTSIDE_KEY, Options

SYNTHETIC_TASKS = ("LaMP-1", "LaMP-2M", "LaMP-3", "LaMP-4", "LaMP-5")
PresetName = Literal["embedded", "paper", "real"]


class TinyModelOptions(Options):
    """The tiny Llama that is trained from random weights when `base.model` is `tiny`."""

    hidden: int = Field(64, ge=8)
    """Width of the model."""
    layers: int = Field(2, ge=1)
    """Number of decoder layers."""
    heads: int = Field(4, ge=1)
    """Number of attention heads; they must divide `hidden` into even sizes."""
    steps: int = Field(1000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(64, ge=1)
    """Questions per step."""
    learning_rate: float = Field(3e-3, gt=0.0)
    """Learning rate of AdamW."""
    max_vocabulary: int = Field(8000, ge=32)
    """Most tokens of its byte-level BPE."""
    history_share: float = Field(0.25, ge=0.0, le=1.0)
    """Share of its training questions with `rag.history_items` items of history in front."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(f"hidden {self.hidden} must give an even size per head ({self.heads})")
        return self


class TrainingOptions(Options):
    """One LoRA, and how it is trained."""

    rank: int = Field(8, ge=1)
    """Rank r of the LoRA."""
    alpha: float = Field(16.0, gt=0.0)
    """Scale: the update is alpha / rank times B A."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Layers with a LoRA: names as PEFT takes them, or all linear layers."""
    target_parameters: list[str] = Field([])
    """Bare parameters with a LoRA, such as a mixture's experts; needs `base.engine=peft`."""
    learning_rate: float = Field(1e-4, gt=0.0)
    """Learning rate of AdamW at its peak."""
    epochs: int = Field(3, ge=1)
    """Passes over the items."""
    batch_size: int = Field(1, ge=1)
    """Items per batch."""
    accumulation: int = Field(2, ge=1)
    """Batches per optimiser step."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_share: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the steps in which the learning rate rises from 0."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradients are scaled down to this norm."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Weight decay of AdamW."""


class TaskAdaptOptions(TrainingOptions):
    """The base model adapted to the LaMP task first, by one LoRA trained on the base users' items.

    The defaults are OPPU's (arXiv 2402.04401, its task_LoRA.py); Per-Pcs does the same in batches
    of 6. OPPU also names "out_proj", which no layer of a Llama is called.
    """

    enabled: bool = False
    """Whether the base model is adapted first."""
    train_on: Literal["queries", "profile", "both"] = "queries"
    """The base users' queries (as OPPU does), their profile items, or both."""
    max_items: int | None = Field(None, ge=1)
    """Most items, drawn by the seed; null: all."""
    alpha: float = Field(8.0, gt=0.0)
    target_modules: list[str] | Literal["all-linear"] = Field(["q_proj", "k_proj", "v_proj"])
    batch_size: int = Field(16, ge=1)
    accumulation: int = Field(1, ge=1)
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    max_grad_norm: float = Field(0.3, gt=0.0)
    weight_decay: float = Field(1e-2, ge=0.0)


class BaseOptions(Options):
    """The frozen base model."""

    model: str = Field("tiny", min_length=1)
    """`tiny`, `smollm2`, a Hugging Face id, a folder or a GGUF file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; `auto` is bfloat16 on a GPU, else float32."""
    quantisation: Literal["none", "nf4"] = "none"
    """`nf4` answers with the model in 4 bits, as published; training stays in full precision."""
    engine: Literal["grouped", "peft"] = "grouped"
    """`grouped`: many users at once; `peft`: stock PEFT, user by user, slow, for experts."""
    gradient_checkpointing: bool = False
    """Save memory in training by computing activations twice."""
    max_tokens: int = Field(256, ge=8)
    """Longest sample in tokens; longer ones are cut."""
    tiny: TinyModelOptions = TinyModelOptions()
    task_adapt: TaskAdaptOptions = TaskAdaptOptions()


class EmbeddingOptions(Options):
    """The vector of a user (AnchorOptions has these fields, too)."""

    embedding: Literal["signature", "input_signature", "text"] = "signature"
    """Gradient of the answers at the model's output or, whitened, its input; or a mean of texts."""
    text_model: str = Field("BAAI/bge-small-en-v1.5", min_length=1)
    """Encoder for `text`: a sentence-transformers model, or `base`, the base model's states."""
    signature_vocabulary: int = Field(64, ge=1, le=256)
    """A signature is projected to at most so many rows."""
    signature_hidden: int = Field(64, ge=1, le=256)
    """A signature is projected to at most so many columns."""


class AnchorOptions(EmbeddingOptions):
    """How users are embedded, clustered, and anchors chosen (docs/method.md, Anchors)."""

    clustering: Literal["hdbscan", "silhouette", "kmeans"] = "hdbscan"
    """`hdbscan` and `silhouette` (k-means) find the number of clusters; `kmeans` (published) makes
    `count` of them."""
    min_cluster_size: int = Field(5, ge=2)
    """Smallest cluster of HDBSCAN."""
    min_samples: int = Field(1, ge=1)
    """HDBSCAN's number of neighbours that make a point dense."""
    selection: Literal["eom", "leaf"] = "eom"
    """HDBSCAN's excess of mass (`eom`), or the leaves of its tree: many small clusters."""
    pca_dimensions: int = Field(8, ge=1)
    """Principal components in which HDBSCAN clusters."""
    count: int = Field(24, ge=1)
    """Number of anchors to choose."""
    min_items: int = Field(11, ge=1)
    """An anchor has at least so many items."""
    noise: Literal["last", "never"] = "last"
    """Candidates that HDBSCAN calls noise become anchors last, or never."""
    train_on: Literal["user", "cluster", "both"] = "user"
    """An anchor is one user (published), a whole cluster with all its items, or both."""
    per_job: Annotated[int, OUTSIDE_KEY] = Field(1, ge=1)
    """Anchors that share one training job; decides no result."""


class BankOptions(Options):
    """A bank that somebody else trained, in place of anchors."""

    adapters: (
        Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None
    ) = None
    """PEFT folders of `base.model`: a folder of them, or a list of folders and Hugging Face ids."""


class StackingOptions(TrainingOptions):
    """The tiny LoRA on top of the merged one."""

    users_per_job: Annotated[int, OUTSIDE_KEY] = Field(64, ge=1)
    """Users that share one job; decides no result."""


class LearnedOptions(Options):
    """How `learned` weights are trained from the evidence's, by Adam on all items at once."""

    steps: int = Field(20, ge=0)
    """Steps of Adam."""
    learning_rate: float = Field(0.01, gt=0.0)
    """Learning rate of Adam."""
    penalty: float = Field(300.0, ge=0.0)
    """Weight of the squared distance from the evidence's weights."""


class FusionOptions(Options):
    """Which anchors a user's LoRA is merged from, with which weights, and how."""

    top_m: int = Field(2, ge=1)
    """Most anchors that are merged."""
    weights: Literal["cosine", "softmax", "evidence", "learned"] = "cosine"
    """By similarity (`cosine`, `softmax`), by the likelihood of the user's items under each anchor
    (`evidence`), or trained from those on (`learned`)."""
    temperature: float = Field(0.1, gt=0.0)
    """Temperature of `softmax`."""
    evidence_temperature: float = Field(3.0, gt=0.0)
    """Temperature of `evidence`; 1 is Bayesian model averaging."""
    vectors: bool = False
    """With `input_signature`, evidence is the mean of two log-likelihoods under an anchor: of the
    user's answers and of their vectors."""
    shortlist: int | None = Field(None, ge=1)
    """Number of most similar anchors for which evidence is computed; null: all."""
    order: Literal["right", "published"] = "right"
    """`published` hands the weights out in reverse, as the published script does."""
    merge: Literal["exact", "factors", "svd"] = "exact"
    """`exact` sums products B A, `factors` (published) averages A and B, `svd` cuts to rank r."""
    learned: LearnedOptions = LearnedOptions()

    @property
    def by_evidence(self) -> bool:
        """Whether weights are those of the evidence, or begin with them."""
        return self.weights in ("evidence", "learned")

    @model_validator(mode="after")
    def _of_the_weights(self) -> Self:
        if self.order == "published" and self.by_evidence:
            raise ValueError("order=published is for weights by cosine or softmax, not by evidence")
        if self.weights == "learned" and self.merge == "svd":
            raise ValueError("weights=learned has no gradient through merge=svd; take merge=exact")
        return self


class RagOptions(Options):
    """The method `rag`."""

    history_items: int = Field(1, ge=1)
    """Items of the history that stand in the prompt."""


class PriorOptions(Options):
    """The methods with a label prior (docs/method.md, Baselines)."""

    strength: float = Field(1.0, ge=0.0)
    """Weight of the log of the prior."""
    smoothing: float = Field(1.0, gt=0.0)
    """Added to each label's count."""


class ScoringOptions(Options):
    """How questions are answered and scored."""

    answer: Literal["generate", "likelihood", "constrained"] = "generate"
    """Greedy text (`generate`), the likeliest label (`likelihood`), or greedy text that can only be
    a label (`constrained`)."""
    metrics: Literal["lamp", "mta_published"] = "lamp"
    """LaMP's own rules, or those of MTA's published scorer (docs/method.md, Scoring)."""
    tokens: Literal["lamp", "unicode"] = "lamp"
    """ROUGE's words: LaMP's, of a to z and digits, or `unicode`, those of any script."""

    @model_validator(mode="after")
    def _published_words(self) -> Self:
        if self.tokens == "unicode" and self.metrics == "mta_published":
            raise ValueError("tokens=unicode is for metrics=lamp: MTA's scorer has words of a to z")
        return self


class MlflowOptions(Options):
    """What MLflow gets beside the run's numbers and files."""

    register_bank: bool = True
    """Register each bank as a version of the model `mta-bank` (docs/personalise.md)."""


class PlanOptions(Options):
    """The machine that `dry_run` estimates for; by default one H100 SXM (bfloat16, dense)."""

    peak_tflops: float = Field(989.0, gt=0.0)
    """Peak of the machine, in TFLOP/s."""
    mfu: float = Field(0.25, gt=0.0, le=1.0)
    """Share of the peak that is reached (assumed); `tests.benchmarks.many_users` measures it."""
    bandwidth_tb: float = Field(3.35, gt=0.0)
    """Memory bandwidth in TB/s; each token of an answer reads all weights."""
    memory_gb: float = Field(80.0, gt=0.0)
    """Memory of the machine, in GB."""
    max_items: int = Field(20_000, ge=1)
    """Most profile items that are tokenised per LaMP task; the others are assumed to be alike."""


class ComputeOptions(Options):
    """Where it runs. `adapter_dtype` alone changes results; `threads` may change last bits."""

    outside_key: ClassVar[bool] = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` takes a GPU if there is one."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the LoRAs' products; their weights stay float32. `auto`: bfloat16 over a
    bfloat16 base on a GPU, else float32."""
    threads: int | None = Field(None, ge=1)
    """Threads of torch on the CPU; null: `cpus_per_job` on Ray, else one for the tiny model, and
    OMP_NUM_THREADS or all cores for others."""
    runner: Literal["local", "ray"] = "local"
    """`ray`: each job is a task of a Ray cluster."""
    workers: Literal["threads", "processes"] | None = None
    """With `runner=local`; null: processes for the tiny model on a CPU, else threads."""
    max_workers: int | None = Field(None, ge=1)
    """Jobs at once with `runner=local`; null: as many as the `gpu` limit has slots, but one on a
    CPU with any model but the tiny one."""
    side_by_side: int | None = Field(None, ge=1)
    """LaMP tasks (of any seed) at once; null: as many as there are workers, on Ray all."""
    ray_address: str | None = Field(None, min_length=1)
    """Address of the Ray cluster; null: one is started for the run."""
    gpus_per_job: float = Field(1.0, ge=0.0)
    """GPUs that a job asks of Ray if it runs the model."""
    cpus_per_job: float = Field(1.0, gt=0.0)
    """CPUs that a job asks of Ray."""
    checkpoint_seconds: float = Field(60.0, ge=0.0)
    """Seconds between checkpoints of a training, which take at most 2 % of the time; 0: none."""
