"""The bundled demo: a small model, texts and evaluation tasks, so that every command can be tried offline."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL_DIR = _HERE / "model"
CALIBRATION = _HERE / "data" / "calibration.jsonl"
EVALUATION = _HERE / "data" / "evaluation.jsonl"
TASKS_DIR = _HERE / "tasks"
