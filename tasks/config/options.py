"""The sections of the configuration, one model each; those of data: tasks/lamp/options.py."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tasks.record import OUTSIDE_KEY, Options

SYNTHETIC_TASKS = ("LaMP-1", "LaMP-2M", "LaMP-3", "LaMP-4", "LaMP-5")
PresetName = Literal["embedded", "paper", "real"]


class TinyModelOptions(Options):
    """The tiny Llama trained from random init when `base.model` is `tiny`."""

    hidden: int = Field(64, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(3e-3, gt=0.0)
    max_vocabulary: int = Field(8000, ge=32)
    # So many of its questions have `rag.history_items` items of the history before them.
    history_share: float = Field(0.25, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyModelOptions:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(f"hidden {self.hidden} must give an even size per head ({self.heads})")
        return self


class TrainingOptions(Options):
    """One LoRA and how it is trained."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0.0)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    # Bare parameters, such as a mixture's experts; only base.engine=peft puts LoRAs on them.
    target_parameters: list[str] = Field([])
    learning_rate: float = Field(1e-4, gt=0.0)
    epochs: int = Field(3, ge=1)
    batch_size: int = Field(1, ge=1)
    accumulation: int = Field(2, ge=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: float = Field(0.1, ge=0.0, le=1.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)


class TaskAdaptOptions(TrainingOptions):
    """The base model adapted to the LaMP task first, by one LoRA trained on the base users' items.

    The defaults are OPPU's (arXiv 2402.04401, its task_LoRA.py), which trains on base users'
    `queries`; Per-Pcs does the same in batches of 6. `max_items`: at most so many, drawn by seed.
    """

    enabled: bool = False
    train_on: Literal["queries", "profile", "both"] = "queries"
    max_items: int | None = Field(None, ge=1)
    alpha: float = Field(8.0, gt=0.0)
    # OPPU also names "out_proj", which no layer of a Llama is called.
    target_modules: list[str] | Literal["all-linear"] = Field(["q_proj", "k_proj", "v_proj"])
    batch_size: int = Field(16, ge=1)
    accumulation: int = Field(1, ge=1)
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    max_grad_norm: float = Field(0.3, gt=0.0)
    weight_decay: float = Field(1e-2, ge=0.0)


class BaseOptions(Options):
    """The frozen base model: `tiny`, or a Hugging Face id or local folder.

    quantisation: `nf4` answers with the model in 4 bits, as published; nothing is trained so.
    engine: `grouped` trains and answers for many users at once; `peft` is stock PEFT, user by user:
    slow, for models that the other cannot put LoRAs on.
    """

    model: str = Field("tiny", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantisation: Literal["none", "nf4"] = "none"
    engine: Literal["grouped", "peft"] = "grouped"
    gradient_checkpointing: bool = False
    max_tokens: int = Field(256, ge=8)
    tiny: TinyModelOptions = TinyModelOptions()
    task_adapt: TaskAdaptOptions = TaskAdaptOptions()


class EmbeddingOptions(Options):
    """The vector of a user (AnchorOptions has these fields, too)."""

    embedding: Literal["signature", "input_signature", "text"] = "signature"
    text_model: str = Field("BAAI/bge-small-en-v1.5", min_length=1)
    signature_vocabulary: int = Field(64, ge=1, le=256)
    signature_hidden: int = Field(64, ge=1, le=256)


class AnchorOptions(EmbeddingOptions):
    """How users are embedded, clustered, and anchors chosen (docs/method.md, Anchors).

    embedding: the gradient of the user's answers at the model's output (`signature`) or at its
    input, whitened (`input_signature`); or a vector of text and answer (`text`).
    train_on: an anchor is one user, as published; a whole cluster with all its items; or both.
    selection: HDBSCAN's excess of mass, or the leaves of its tree: many small clusters.
    reassign: k-means goes on from HDBSCAN's clusters, and takes in what it calls noise.
    refits: at most so many rounds fit the clusters again by evidence, `refit_epochs` of training
    in each. per_job: this many anchors share one training job.
    """

    clustering: Literal["hdbscan", "kmeans"] = "hdbscan"
    min_cluster_size: int = Field(5, ge=2)
    min_samples: int = Field(1, ge=1)
    selection: Literal["eom", "leaf"] = "eom"
    reassign: bool = False
    refits: int = Field(0, ge=0)
    refit_epochs: int = Field(2, ge=1)
    pca_dimensions: int = Field(8, ge=1)
    count: int = Field(24, ge=1)
    min_items: int = Field(11, ge=1)
    noise: Literal["last", "never"] = "last"
    train_on: Literal["user", "cluster", "both"] = "user"
    per_job: Annotated[int, OUTSIDE_KEY] = Field(1, ge=1)


class BankOptions(Options):
    """A bank that somebody else trained, in place of anchors.

    adapters: PEFT folders of `base.model`, each a folder or a Hugging Face id; or a folder of them.
    """

    adapters: (
        Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None
    ) = None


class StackingOptions(TrainingOptions):
    """The tiny LoRA on top of the merged one; `users_per_job` users share one task run."""

    users_per_job: Annotated[int, OUTSIDE_KEY] = Field(64, ge=1)


class LearnedOptions(Options):
    """How weights are learned from those of the evidence: steps of Adam, each on all the items.

    penalty: of their squared distance from the evidence's (tasks/lora/mixture.py).
    """

    steps: int = Field(20, ge=0)
    learning_rate: float = Field(0.01, gt=0.0)
    penalty: float = Field(300.0, ge=0.0)


class FusionOptions(Options):
    """Which anchors a user's LoRA is merged from, with which weights, and how.

    `evidence`: by the likelihood of the user's own items under each anchor's LoRA, among the
    `shortlist` most similar anchors (all of them where it is null). `learned`: from these on by
    gradients (`LearnedOptions`).
    """

    top_m: int = Field(2, ge=1)
    weights: Literal["cosine", "softmax", "evidence", "learned"] = "cosine"
    temperature: float = Field(0.1, gt=0.0)
    evidence_temperature: float = Field(3.0, gt=0.0)
    shortlist: int | None = Field(None, ge=1)
    order: Literal["right", "published"] = "right"
    merge: Literal["exact", "factors", "svd"] = "exact"
    learned: LearnedOptions = LearnedOptions()

    @property
    def by_evidence(self) -> bool:
        """Whether weights are those of the evidence, or begin with them."""
        return self.weights in ("evidence", "learned")

    @model_validator(mode="after")
    def _order_is_of_cosines(self) -> FusionOptions:
        if self.order == "published" and self.by_evidence:
            raise ValueError("order=published is for weights by cosine or softmax, not by evidence")
        return self

    @model_validator(mode="after")
    def _learned_through_the_merge(self) -> FusionOptions:
        if self.weights == "learned" and self.merge == "svd":
            raise ValueError("weights=learned has no gradient through merge=svd; take merge=exact")
        return self


class RagOptions(Options):
    """The method `rag`: how many items of the history stand in the prompt."""

    history_items: int = Field(1, ge=1)


class PriorOptions(Options):
    """The methods with a label prior: its strength, and its smoothing (tasks/method/prior.py)."""

    strength: float = Field(1.0, ge=0.0)
    smoothing: float = Field(1.0, gt=0.0)


class ScoringOptions(Options):
    """How questions are answered: by greedy decoding, or by one of the task's labels.

    answer: `likelihood` takes the likeliest label; `constrained` decodes greedily, but writes none
    but labels. Both run the prompt once.
    metrics: LaMP's own rules, or those of MTA's published scorer (docs/method.md, Scoring).
    tokens: ROUGE's words: LaMP's, of a to z and digits, or `unicode`, those of any script.
    """

    answer: Literal["generate", "likelihood", "constrained"] = "generate"
    metrics: Literal["lamp", "mta_published"] = "lamp"
    tokens: Literal["lamp", "unicode"] = "lamp"

    @model_validator(mode="after")
    def _published_words(self) -> ScoringOptions:
        if self.tokens == "unicode" and self.metrics == "mta_published":
            raise ValueError("tokens=unicode is for metrics=lamp: MTA's scorer has words of a to z")
        return self


class MlflowOptions(Options):
    """What MLflow gets beside the run's numbers and files.

    register_bank: each bank as a version of the registered model `mta-bank` (docs/personalise.md).
    """

    register_bank: bool = True


class PlanOptions(Options):
    """The machine that `dry_run` estimates for; by default one H100 SXM (bfloat16, dense).

    mfu: the share of the peak that training and reading prompts reach, an assumption: 0.02 was
    measured with 8 users of a 1B model on an H200, cold (docs/benchmarks.md); give what
    `tests.benchmarks.many_users` measures. bandwidth_tb: each token of an answer reads all weights.
    max_items: so many are tokenised per task.
    """

    peak_tflops: float = Field(989.0, gt=0.0)
    mfu: float = Field(0.25, gt=0.0, le=1.0)
    bandwidth_tb: float = Field(3.35, gt=0.0)
    memory_gb: float = Field(80.0, gt=0.0)
    max_items: int = Field(20_000, ge=1)


class ComputeOptions(Options):
    """Where it runs. It decides no result; the last bits follow the threads of torch on a CPU.

    But for `adapter_dtype`, which is in the keys as `base.dtype` is.
    """

    outside_key: ClassVar[bool] = True

    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Of the LoRAs' products; their weights and AdamW's moments are float32. auto: bfloat16 over a
    # bfloat16 base on a GPU, else float32.
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Of torch on the CPU. None: `cpus_per_job` on Ray; else one for the tiny model, whose steps are
    # too small to share, and OMP_NUM_THREADS, or all cores without it, for others.
    threads: int | None = Field(None, ge=1)
    # ray: each job is a task of a Ray cluster, at `ray_address`, or of one started for the run.
    runner: Literal["local", "ray"] = "local"
    # Of runner=local. None: processes for the tiny model on a CPU, else threads.
    workers: Literal["threads", "processes"] | None = None
    # Jobs at once with runner=local. None: as many as the `gpu` limit has slots, but one on a CPU
    # with any other than the tiny model, which uses all cores.
    max_workers: int | None = Field(None, ge=1)
    # LaMP tasks (of any seed) at once. None: as many as there are workers; on Ray all.
    side_by_side: int | None = Field(None, ge=1)
    ray_address: str | None = Field(None, min_length=1)
    # What a job that runs the model asks of Ray (all others ask for no GPU).
    gpus_per_job: float = Field(1.0, ge=0.0)
    cpus_per_job: float = Field(1.0, gt=0.0)
    # Seconds between two checkpoints of a training; never more than 2 % of the time goes into them.
    # 0: none.
    checkpoint_seconds: float = Field(60.0, ge=0.0)
