"""Train the bundled demo model from text files of short stories.

    python -m compress.demo.train_demo_model --output compress/demo/model stories-1.txt stories-2.txt

Stories are separated by ``<|endoftext|>`` (or by single line breaks in a file without it). Takes about an hour on a
laptop; the same command with ``--resume`` goes on after an interruption.
"""

import argparse
import json
import logging
from dataclasses import fields
from pathlib import Path

import torch

from compress.demo import EVALUATION
from compress.demo.training.card import Figures, write_card
from compress.demo.training.loop import Settings, TokenStream, Trainer
from compress.demo.training.model import CONTEXT, VOCABULARY, build_model
from compress.demo.training.score import bits_per_byte
from compress.demo.training.text import read_stories, split_stories
from compress.demo.training.tokenizer import save_tokenizer, train_tokenizer

log = logging.getLogger("train_demo_model")


def parse_arguments() -> argparse.Namespace:
    """Every field of Settings is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text files of stories")
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--work", type=Path, default=Path("demo_training"), help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2, 4, 8), help="threads that share a batch")
    parser.add_argument("--remark", default="", help="a sentence about the run for the model card")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    return parser.parse_args()


def main() -> None:
    """Read, split, train, and write the model folder."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})

    stories = [story for path in arguments.files for story in read_stories(path)]
    training, held_out = split_stories(stories, settings.held_out_share, settings.seed)
    tokenizer = train_tokenizer(training, VOCABULARY, CONTEXT)
    stream = TokenStream(tokenizer, training, settings.seed)
    log.info("%d stories to train on, %d tokens; %d held out", len(training), stream.epoch_tokens, len(held_out))

    generator = torch.Generator().manual_seed(settings.seed)
    model = build_model(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, generator)
    trainer = Trainer(model, tokenizer, stream, held_out, settings, arguments.workers)
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.work / "checkpoint.safetensors"
    if arguments.resume:
        trainer.resume(checkpoint)
    trainer.train(checkpoint)

    model.load_state_dict(trainer.best_weights, strict=False)  # the head is the embedding
    model.to(torch.bfloat16)
    model.save_pretrained(arguments.output)
    save_tokenizer(tokenizer, arguments.output)
    model.float()  # the rounded weights with float32 arithmetic, which every CPU does quickly
    figures = measure(trainer, training, held_out)
    write_card(arguments.output, settings, figures, arguments.remark)
    log.info("%s", figures)


def measure(trainer: Trainer, training: list[str], held_out: list[str]) -> Figures:
    """The finished model's figures for its card."""
    model, tokenizer = trainer.model, trainer.tokenizer
    own = [json.loads(line)["text"] for line in EVALUATION.read_text(encoding="utf-8").splitlines()]
    sample = training[: len(held_out)]
    return Figures(
        parameters=sum(param.numel() for param in model.parameters()),
        training_stories=len(training),
        training_tokens=trainer.stream.epoch_tokens,
        training_sample=len(sample),
        held_out_stories=len(held_out),
        best_step=trainer.best_step,
        held_out_bits=bits_per_byte(model, tokenizer, held_out),
        training_bits=bits_per_byte(model, tokenizer, sample),
        own_bits=bits_per_byte(model, tokenizer, own),
    )


if __name__ == "__main__":
    main()
