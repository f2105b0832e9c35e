"""Distillation on generated text: what is learned from, that it is heard through the runtime, and that runs go on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, UsageError
from compress.core.files import sha256_file
from compress.core.journal import Journal
from compress.core.kept import Kept
from compress.core.passes import Job
from compress.core.replaced import ReplacedCheckpoint
from compress.core.services import Sampling
from compress.pipeline import RunOptions, run
from compress.sampling import RuntimeSampler
from distill._batches import NO_TARGET, Batch
from distill._completions import completed, prompts_of, teacher_batches
from distill._onpolicy import StudentBatches, is_student_step
from distill._sequence import text_loss
from distill._student import Student
from distill.logits import Logits
from distill.onpolicy import OnPolicy
from distill.sequence import Sequence
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, tokens_for
from tests.distill.test_logits import CUT, FAMILIES, Losses, Stopped, recipe_of

SHORT = {"prompt_tokens": 8, "new_tokens": 12}


def lessons(method: str, steps: int, **settings: Any) -> dict[str, Any]:
    asked = {"method": method, **SHORT, "batch": 4, "learning_rate": 1e-3, "save_every": 3}
    rows = 32 if method == "onpolicy" else 20
    return {"distill": {**asked, "tokens": steps * 4 * rows, **settings}}


def changed(source: Checkpoint, seed: int) -> ReplacedCheckpoint:
    """The same model with other weights everywhere, fp32."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in source.tensors:
        value = source.tensor(name).float()
        values[name] = value + 0.3 * value.std() * torch.randn(value.shape, generator=generator)
    return ReplacedCheckpoint(source, values)


@torch.no_grad()
def greedy(source: Checkpoint, prompt: list[int], count: int) -> list[int]:
    """What transformers says."""
    model, ids = source.build_model(torch.float32), torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampler_says_what_its_weights_of_now_say(tiny_model: TinyModel, family: str) -> None:
    source = Checkpoint.open(tiny_model(family))
    prompt = list(range(30, 55))  # longer than a page of keys and values: what is known of it must be forgotten
    sampler = RuntimeSampler(source, Sampling(25, 6, 0.0, 1.0, 2), "cpu")
    said = []
    for now in (source, changed(source, 1)):
        if now is not source:
            sampler.refresh(now)
        said.append(sampler.complete([prompt], [0]))
        expected = greedy(now, prompt, 6)
        assert said[-1] == [expected[: expected.index(257) + 1] if 257 in expected else expected]
    assert said[0] != said[1]


def test_a_completion_depends_on_weights_prompt_and_seed_alone(tiny_model: TinyModel) -> None:
    source = Checkpoint.open(tiny_model("llama", True))
    prompts = [list(range(40, 40 + count)) for count in (20, 3, 9, 17)]
    sampler = RuntimeSampler(source, Sampling(20, 10, 1.0, 0.9, 4), "cpu")
    together = sampler.complete(prompts, [5, 6, 7, 8])
    alone = RuntimeSampler(source, Sampling(20, 10, 1.0, 0.9, 1), "cpu")
    assert [alone.complete([prompts[i]], [5 + i])[0] for i in (3, 0, 2, 1)] == [together[i] for i in (3, 0, 2, 1)]
    assert sampler.complete(prompts, [9, 10, 11, 12]) != together


def test_prompts_end_where_a_text_ends() -> None:
    ids = torch.tensor([[9, 1, 2, 9, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 0, 0, 0, 0]])
    tokens = Tokens.of(ids, torch.tensor([6, 6, 2]))
    rows = torch.tensor([0, 1, 2])
    assert prompts_of(tokens, rows, 5, frozenset({9, 0})) == [[9, 1, 2], [1, 2, 3, 4, 5], [1, 2]]


def test_only_generated_tokens_are_targets() -> None:
    batch = completed([[1, 2, 3], [4]], [[5, 257], [6, 7, 8]])
    assert batch.ids_BT.tolist() == [[1, 2, 3, 5, 257], [4, 6, 7, 8, 0]]
    no = NO_TARGET
    assert batch.target_BT.tolist() == [[no, no, 5, 257, no], [6, 7, 8, no, no]]


def test_padding_and_prompts_count_for_nothing(tiny_model: TinyModel) -> None:
    model = Checkpoint.open(tiny_model("llama")).build_model(torch.float32)
    prompts, said = [[1, 2, 3], [4]], [[5, 257], [6, 7, 8]]
    surprises = []
    for prompt, new in zip(prompts, said, strict=True):
        with torch.no_grad():
            log_p_TV = model(input_ids=torch.tensor([prompt + new])).logits[0].log_softmax(-1)
        surprises += [-float(log_p_TV[len(prompt) - 1 + place, token]) for place, token in enumerate(new)]
    loss = text_loss(model)(completed(prompts, said))
    assert float(loss) == pytest.approx(sum(surprises) / 5, rel=1e-5)


def test_the_draw_of_a_step_follows_from_seed_and_number() -> None:
    settings = OnPolicy(student_share=0.3, offpolicy=0.5)
    drawn = [is_student_step(settings, step, 2000) for step in range(2000)]
    assert not any(drawn[:1000])
    assert 0.25 < sum(drawn[1000:]) / 1000 < 0.35
    assert drawn == [is_student_step(settings, step, 2000) for step in range(2000)]
    assert drawn != [is_student_step(OnPolicy(student_share=0.3, seed=1), step, 2000) for step in range(2000)]
    assert all(is_student_step(OnPolicy(student_share=1.0), step, 9) for step in range(9))


LESSONS = {
    "sequence": lessons("sequence", 5),
    "sequence-logits": lessons("sequence", 5, loss="logits", top_p=0.9),
    "onpolicy": lessons("onpolicy", 5, student_share=0.6, offpolicy=0.2),
    "onpolicy-teacher": lessons("onpolicy", 5, student_share=0.5, otherwise="teacher", divergence="jsd"),
}


@pytest.mark.parametrize("name", LESSONS)
def test_a_stopped_run_ends_with_the_same_losses_and_bytes(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    recipe = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), CUT, LESSONS[name])
    whole, first, second = Losses(), Losses(4), Losses()
    result = run(recipe, RunOptions(tmp_path / "whole"), whole)
    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "stopped"), first)
    again = run(recipe, RunOptions(tmp_path / "stopped"), second)
    assert len(whole.values) > 4 and first.values == whole.values[:4] and second.values == whole.values[3:]
    same = [{p.name: sha256_file(p) for p in folder.iterdir()} for folder in (result.artifact, again.artifact)]
    assert same[0] == same[1]


class Teacher:
    """A service that stands in for the runtime: counts prompts, and fails when it has had enough."""

    end_tokens = frozenset({257})

    def __init__(self, enough: int) -> None:
        self.left = enough

    def __call__(self, source: Checkpoint, sampling: Sampling) -> Teacher:
        return self

    def refresh(self, source: Checkpoint) -> None:
        raise AssertionError("a teacher stays as it is")

    def complete(self, prompts: Any, seeds: Any) -> list[list[int]]:
        self.left -= len(prompts)
        if self.left < 0:
            raise Stopped
        return [[prompt[0], seed % 256, 257] for prompt, seed in zip(prompts, seeds, strict=True)]


def test_what_the_teacher_wrote_is_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_model("llama"))
    tokens, settings = tokens_for(source, samples=150), Sequence(prompt_tokens=4, new_tokens=3, batch=150)
    kept = Kept(tmp_path / "kept", Journal(tmp_path / "journal.jsonl", {}), 0)

    def batch_of(enough: int, keep: Any) -> Batch:
        job = Job(source, tokens, Shelf(), open_sampler=Teacher(enough), keep=keep)
        return teacher_batches(settings, job, tokens)(0)

    with pytest.raises(Stopped):
        batch_of(100, kept)
    resumed, whole = batch_of(150 - 64, kept), batch_of(150, lambda name, compute: compute())
    assert torch.equal(resumed.ids_BT, whole.ids_BT) and torch.equal(resumed.target_BT, whole.target_BT)
    assert torch.equal(batch_of(0, kept).ids_BT, whole.ids_BT)
    (path,) = (tmp_path / "kept").glob("*-00000064.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="not as the journal says"):
        batch_of(0, kept)


def test_the_student_of_now_writes(tiny_model: TinyModel) -> None:
    source = Checkpoint.open(tiny_model("llama", False, "bfloat16"))
    tokens = tokens_for(source)
    settings = OnPolicy(prompt_tokens=6, new_tokens=5, batch=2, sampling_temperature=0.0)
    job = Job(source, tokens, Shelf(), open_sampler=partial(RuntimeSampler, device="cpu"))
    student = Student(job, settings)
    batches = StudentBatches(settings, job, student, tokens)
    for step in range(3):
        batch = batches(step)
        for ids_T, target_T in zip(batch.ids_BT, batch.target_BT, strict=True):
            prompt = ids_T[: int((target_T != NO_TARGET).nonzero()[0]) + 1].tolist()
            said = target_T[target_T != NO_TARGET].tolist()
            expected = greedy(ReplacedCheckpoint(source, student.tensors()), prompt, 5)
            assert said == (expected[: expected.index(257) + 1] if 257 in expected else expected)
        with torch.no_grad():
            for parameter in student.model.parameters():
                parameter.mul_(1 + 0.3 * torch.linspace(-1, 1, parameter.shape[-1]))


def test_the_text_of_a_plan() -> None:
    with_text, with_teacher = OnPolicy(tokens=64_000, batch=4), OnPolicy(tokens=64_000, batch=4, otherwise="teacher")
    tokens = Tokens.of(torch.zeros(10, 448, dtype=torch.int64))
    assert with_text.steps(tokens) == 64_000 // (4 * (192 + 448) // 2)
    assert with_teacher.steps(tokens) == round(64_000 / (4 * 192))
    assert (with_text.longest(tokens), with_teacher.longest(tokens)) == (448, 192)


def test_a_plan_holds_the_runtime_and_refuses_what_does_not_fit(tiny_model: TinyModel) -> None:
    source = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_for(source)
    plain = Logits().plan(source, tokens)
    small, large = (OnPolicy(prompt_tokens=8, new_tokens=40, batch=batch).plan(source, tokens) for batch in (16, 32))
    page_bytes = 3 * 2 * 2 * 16 * 16 * 4  # blocks, keys and values, heads, channels, tokens, fp32
    sampling = 2 * 16 * 320 * 4
    assert large.peak_memory_bytes - small.peak_memory_bytes == 16 * 3 * page_bytes + sampling
    assert small.peak_memory_bytes > plain.peak_memory_bytes and small.minutes > plain.minutes
    with pytest.raises(UsageError, match="are 300 together, and the model has 256 positions"):
        Sequence(prompt_tokens=100, new_tokens=200).plan(source, tokens)
