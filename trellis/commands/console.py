"""What several commands need: the line of an error, a progress bar, the device to use."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def failed(errors: Console, what: str, error: BaseException, verbose: bool) -> int:
    """Say on the error stream in one line what went wrong; the exit code."""
    errors.print(f"[red]error[/] {escape(what)}: {escape(str(error) or type(error).__name__)}", soft_wrap=True)
    if verbose:
        errors.print_exception()
    return 1


def progress_bars(console: Console) -> Progress:
    """Bars that go away when they are done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def chosen_device(name: str) -> str:
    """`name`, or for ``auto`` a GPU if every operator has a kernel there, else the CPU."""
    import torch

    import trellis_kernels

    if name != "auto":
        return name
    # Derivatives are for training: what is shown or generated does not need them.
    derivatives = ("_backward", "_gradient")
    needed = [o for name, o in trellis_kernels.OPERATORS.items() if not name.endswith(derivatives)]
    everywhere = all("cuda" in operator.kernels for operator in needed)
    return "cuda" if torch.cuda.is_available() and everywhere else "cpu"
