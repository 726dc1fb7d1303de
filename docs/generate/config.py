"""The reference of the configuration: every file of conf/ with the comments in it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("conf", "hydra_plugins/moe_plugin_groups")
INTRODUCTION = """# Configuration

```bash
moe-train experiment=demo router=qwen3 trainer.max_steps=500   # two groups, one key
moe-train --cfg job --resolve                                  # the configuration, without a run
```

`group=option` chooses a file, `group.key=value` changes a key in it. `balancing=loss_free`, `callbacks` and `rule` also
work in [your own Hydra app](../hydra.md). Made by `make reference` from the comments in `conf/`.
"""


def config_page() -> str:
    """Return a section for each group, with a line and the content of each option."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.yaml")]
    groups: dict[str, list[Path]] = {}
    for path in sorted(files, key=lambda path: (_group(path), _order(path))):
        groups.setdefault(_group(path), []).append(path)
    return INTRODUCTION + "".join(_section(group, paths) for group, paths in groups.items())


def _group(path: Path) -> str:
    (folder,) = (ROOT / folder for folder in FOLDERS if path.is_relative_to(ROOT / folder))
    return path.parent.relative_to(folder).as_posix()


def _order(path: Path) -> tuple[int, str]:
    """Order options by name, and those that are numbers by size."""
    return (int(path.stem) if path.stem.isdigit() else 0, path.stem)


def _section(group: str, paths: list[Path]) -> str:
    title = "Complete configurations" if group == "." else f"`{group}=`"
    rows = "".join(f"| `{path.stem}` | {_purpose(path)} |\n" for path in paths)
    files = "".join(_content(path) for path in paths)
    return f"\n## {title}\n\n| option | what it is |\n|---|---|\n{rows}{files}"


def _purpose(path: Path) -> str:
    """Return the comment at the top of a file, up to its examples."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# ") or line.startswith("#   "):
            break
        words.append(line[2:].strip())
    return " ".join(words).replace("|", "\\|")


def _content(path: Path) -> str:
    place = path.relative_to(ROOT).as_posix()
    return f'\n??? note "`{place}`"\n    ```yaml\n    --8<-- "{place}"\n    ```\n'
