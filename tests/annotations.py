"""Which modules of the package annotate arrays with their shapes."""

import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1] / "icet_jax"
_SHAPED = re.compile(r"\b(?:Bool|Float|Int|Key|Shaped)\[")


def with_array_annotations() -> list[str]:
    """Returns the names of the modules that contain such an annotation."""
    return [_name(path) for path in sorted(_PACKAGE.rglob("*.py")) if _SHAPED.search(path.read_text(encoding="utf-8"))]


def _name(path: Path) -> str:
    """Returns the name under which Python imports a file of the package."""
    parts = path.relative_to(_PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
