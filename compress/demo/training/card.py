"""The demo model's card; filled in below."""
from pathlib import Path
def write_card(output: Path, **figures) -> None:
    (output / "README.md").write_text(str(figures))
