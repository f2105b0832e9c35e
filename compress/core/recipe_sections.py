"""The sections of a recipe beside its stages: calibration, export, evaluation, gate. Descriptions go to the schema."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from compress.core.places import locate
from compress.core.quantities import Fraction, Size

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
AtLeastTwo = Annotated[int, Field(ge=2)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _not_a_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"should be auto, true or false, not {value}")  # pydantic takes 1 for true in a Literal
    return value


SpecialTokens = Annotated[Literal["auto", True, False], BeforeValidator(_not_a_number)]
_DATASET = "hub id (owner/name or owner/name:configuration), folder, .jsonl, .txt, .parquet, or demo"
_SPECIAL = "auto: what the tokenizer adds; true: also a start token where it adds none; false: none"


class Section(BaseModel):
    """Strict, frozen, closed: a wrong type is an error and so is an unknown key. Validators are built at first use."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", defer_build=True)


class Calibration(Section):
    """Text (or token ids) that calibrated methods look at. Relative paths start at the recipe's folder."""

    dataset: Text = Field(description=f"{_DATASET}; or token ids in .safetensors")
    field: Text = Field("text", description="where the text is in a row")
    split: Text = Field("train", description="split of a hub data set")
    samples: Positive = Field(128, description="rows of tokens; of a token file all, unless given")
    length: AtLeastTwo = Field(2048, description="tokens in a row; of a token file all, unless given")
    seed: NotNegative = Field(0, description="decides which documents are taken, and in which order")
    pack: bool = Field(True, description="documents end to end; false: one a row, padded")
    special_tokens: SpecialTokens = Field("auto", description=_SPECIAL)
    prefix: str = Field("", description="text before each document")
    chat_template: bool = Field(False, description="render message lists with the model's template")
    sha256: Sha256 | None = Field(None, description="refuse other tokens than those with this hash")

    @model_serializer(mode="wrap")
    def _as_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Token files are taken whole where the recipe leaves their size open; it stays open when written back."""
        data = dump(self)
        if self.dataset.endswith(".safetensors"):
            return {k: v for k, v in data.items() if k in self.model_fields_set or k not in ("samples", "length")}
        return data


class Export(Section):
    """How the result is stored on disk. GGUF is written by `compress export`, from the finished artifact."""

    format: Literal["compressed-tensors", "gptq", "awq", "bitsandbytes"] = Field(
        default="compressed-tensors",
        description="format of the artifact; all hold the same weights, to the bit. nf4: bitsandbytes, by itself",
    )

    @field_validator("format", mode="before")
    @classmethod
    def _not_gguf(cls, name: object) -> object:
        if name == "gguf":
            raise ValueError("GGUF is written from the finished artifact: compress export ARTIFACT --format gguf")
        return name


class Perplexity(Section):
    """Perplexity, KL divergence and flips over a text."""

    dataset: Text = Field(description=_DATASET)
    field: Text = Field("text", description="where the text is in a row")
    split: Text = Field("test", description="split of a hub data set")
    window: AtLeastTwo = Field(2048, description="tokens that the model sees at once")
    stride: Positive | None = Field(None, description="tokens that a window advances; the whole window, unless given")
    samples: Positive | None = Field(None, description="documents to read; all, unless given")
    prefix: str = Field("", description="text before each document")
    special_tokens: SpecialTokens = Field("auto", description=_SPECIAL)
    documents: bool = Field(False, description="score each document by itself; false: end to end")


LongTask = Literal["passkey", "needle", "multi_key", "table"]


class LongContext(Section):
    """Recall of facts from long contexts, answered through the runtime, and perplexity over long text."""

    tasks: Annotated[tuple[LongTask, ...], Field(min_length=1)] = Field(
        ("passkey", "needle", "multi_key", "table"),
        description="a pass key in plain filler; a fact, one of four facts, a row of a table in the dataset's text",
    )
    lengths: Annotated[tuple[Annotated[int, Field(ge=256)], ...], Field(min_length=1, max_length=16)] = Field(
        (4096,), description="tokens of a prompt and its answer"
    )
    samples: Positive = Field(20, description="questions of each task at each length, the fact ever farther down")
    dataset: Text | None = Field(None, description=f"texts around the facts: {_DATASET}; filler of our own, if none")
    field: Text = Field("text", description="where the text is in a row")
    split: Text = Field("test", description="split of a hub data set")
    prefix: str = Field("", description="text before each prompt")
    special_tokens: SpecialTokens = Field("auto", description=_SPECIAL)
    perplexity: bool = Field(True, description="over the dataset's text, in windows of each length")


class Speed(Section):
    """Tokens a second through the runtime, the original and the artifact in turns. Of this machine: for the report."""

    batches: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)] = Field(
        (1, 16), description="requests at a time, each a row of the report"
    )
    prompt_tokens: Positive = Field(128, description="tokens of each prompt, random ones")
    output_tokens: AtLeastTwo = Field(64, description="tokens that each request is answered with")
    rounds: Annotated[int, Field(ge=1, le=100)] = Field(3, description="turns of each model; medians count")


class Refusals(Section):
    """Which prompts the models decline to answer. With `chat_template` they are asked as a chat."""

    prompts: Text | None = Field(
        None, description='.jsonl of {"kind": "harmful" or "harmless", "prompt": …}; bundled ones, unless given'
    )
    new_tokens: Positive = Field(32, description="tokens of each answer, of which the first words decide")


class Evaluation(Section):
    """What is measured on the original and on the artifact."""

    perplexity: Perplexity | None = Field(None, description="perplexity, KL divergence and flips over a text")
    tasks: tuple[Text, ...] = Field((), description="lm-eval tasks by name")
    task_folder: Text | None = Field(None, description="folder of lm-eval task files, or demo")
    fewshot: NotNegative | None = Field(None, description="examples in a prompt; as the task says, unless given")
    limit: Positive | None = Field(None, description="documents of each task; all, unless given")
    chat_template: bool = Field(False, description="ask with the model's chat template")
    through: Literal["runtime", "transformers"] = Field("runtime", description="what runs the models")
    long_context: LongContext | None = Field(None, description="recall of facts from long contexts")
    speed: Speed | None = Field(None, description="tokens a second of both in the runtime, for the report")
    refusals: Refusals | None = Field(None, description="which of some harmful and harmless prompts are refused")
    numerics: Literal["fast", "exact"] = Field(
        "fast", description="of the runtime: packed kernels as deployed, or fp32 that depends on nothing but the text"
    )
    stages: bool = Field(
        False, description="perplexity and KL divergence behind each stage, too: what it costs, or wins back"
    )
    seed: NotNegative = Field(0, description="of bootstrap intervals and few-shot examples")

    def located(self, base_folder: Path) -> "Evaluation":
        """This evaluation with absolute paths, as `Recipe.located` gives it."""
        update: dict[str, Any] = {}
        if self.task_folder:
            update["task_folder"] = locate(self.task_folder, "tasks", base_folder)
        if self.perplexity:
            dataset = locate(self.perplexity.dataset, "evaluation", base_folder)
            update["perplexity"] = self.perplexity.model_copy(update={"dataset": dataset})
        if self.refusals and self.refusals.prompts:
            prompts = locate(self.refusals.prompts, "evaluation", base_folder)
            update["refusals"] = self.refusals.model_copy(update={"prompts": prompts})
        if self.long_context and self.long_context.dataset:
            dataset = locate(self.long_context.dataset, "evaluation", base_folder)
            update["long_context"] = self.long_context.model_copy(update={"dataset": dataset})
        return self.model_copy(update=update)

    @property
    def measures_quality(self) -> bool:
        """Whether anything is asked that the artifact's evaluation.json keeps."""
        return any((self.perplexity, self.tasks, self.refusals, self.long_context))


class Gate(Section):
    """Bounds that the artifact must keep, else the command ends with exit code 5. Each needs its measurement."""

    max_perplexity_increase: Fraction | None = Field(None, description="of the artifact over the original, e.g. 2%")
    max_perplexity: Annotated[float, Field(gt=0)] | None = Field(None, description="of the artifact")
    max_kl: Annotated[float, Field(ge=0)] | None = Field(None, description="mean KL divergence, nats per token")
    max_flip_rate: Fraction | None = Field(None, description="positions whose likeliest token differs, e.g. 5%")
    max_refusal_change: Fraction | None = Field(
        None, description="prompts that one model refuses and the other answers, e.g. 2%"
    )
    max_recall_drop: Fraction | None = Field(
        None, description="most that the right answers of any long-context task at any length may fall, e.g. 5%"
    )
    max_size: Size | None = Field(None, description="bytes of all files, e.g. 120MB or 4GiB")
    min_accuracy: dict[Text, Fraction] = Field(default_factory=dict, description="least accuracy by task")
    max_accuracy_drop: Fraction | None = Field(None, description="most that the accuracy of any task may fall, e.g. 1%")
