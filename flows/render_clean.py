"""What `surgeon clean` removed or would remove, as a table."""

from typing import Any

from rich.console import Console
from rich.table import Table


def render_clean(found: dict[str, Any], console: Console) -> None:
    """What goes by kind, why the rest stays, and what to do next."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    table = Table(title=f"{found['store']}: {_size(_total(found))}", title_justify="left")
    for name in ("", "number", "size", "frees"):
        table.add_column(name, justify="left" if not name else "right")
    verb = "removed" if found["removed"] else "would go"
    rows = [(f"{verb}: {kind}", count) for kind, count in found["going_by_kind"].items()]
    rows += [(f"{verb}: left by ended processes", found["temporary"])]
    aside = f"{verb}: set aside" if found["set_aside"]["going"] else "stays: set aside (--damaged removes them)"
    rows += [(aside, found["set_aside"])]
    rows += [(f"stays: {reason}", count) for reason, count in found["staying_by_reason"].items()]
    for name, count in rows:
        if count["n"]:
            frees = "" if name.startswith("stays") else _size(count["freed_bytes"])
            table.add_row(name, str(count["n"]), _size(count["bytes"]), frees)
    console.print(table)
    for line in found["unknown"]:
        say(f"not known what it needs: {line}")
    for user in found["in_use_by"]:
        say(f"in use by process {user.get('pid')} ({user.get('command')}), since {user.get('since')}")
    total = found["going"]
    if not found["removed"] and (total["n"] or found["temporary"]["n"]):
        say("nothing was removed yet: add --yes")
    if found["bucket"] is not None:
        say(f"the bucket {found['bucket']} is left as it is; what goes here is fetched again when it is needed")
    if total["freed_bytes"] < total["bytes"]:
        say("files that a view or DVC's cache holds too are freed when those go (`dvc gc`)")


def render_restored(restored: dict[str, Any], console: Console) -> None:
    """One line for what was taken in, and one for everything that was not."""
    text = (
        f"{restored['taken']} results taken in, {restored['references']} as references only, {restored['there']} there"
    )
    console.print(text, highlight=False, soft_wrap=True)
    for line in restored["damaged"]:
        console.print(f"refused: {line}", highlight=False, markup=False, soft_wrap=True)


def _total(found: dict[str, Any]) -> int:
    return sum(int(found[part]["bytes"]) for part in ("going", "staying", "temporary", "set_aside"))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"
