"""The command `attend`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensorattn.attend.choices import default_choices, parse_choices
from tensorattn.attend.job import Settings, examine, prepare
from tensorattn.attend.optional import require
from tensorattn.attend.output import check_directory, png_bytes, write_files
from tensorattn.attend.recordings import Recording, load, parse_modes, sample_video, sample_volume
from tensorattn.errors import OptionError
from tensorattn.operators import OPERATORS

__all__ = ["register"]

PACKAGED = (  # the packaged recordings: where they come from, patch, and the query to draw
    (sample_video, "2,2,2", "15,110,153"),  # on the wall between the chambers of the heart
    (sample_volume, "2,2,2", "64,48,12"),
)
LARGEST_DEVIATION = 1e6  # of logits: beyond it float32 rounds them by more than a tenth
STEPS = 4  # pieces of work beside the operators: embedding, sampled queries, baselines, figures

DESCRIPTION = """\
Show what attention operators do on a recording: a table of cost and error, and figures.

Without FILE, two packaged recordings are taken: a video (an echocardiogram) and a volume (a brain).
Otherwise FILE is read: .nii, .nii.gz, .npy, .npz, .tif, .dcm; .mp4 and .avi where PyAV is installed.
"""

EPILOG = """\
How a recording becomes queries, keys and values (nothing is trained): it is cut into patches, padded with its last
entries where sizes are not divisible; every entry of a patch is standardised over the recording; a random affine map
takes each patch to --dim channels, which are layer-normalised; three independent random maps give queries, keys and
values of every head. The logits of a query are scaled so that their standard deviation over the keys is --logit-std,
in root mean square over queries and heads. That choice decides the ranking: what comes close to soft attention need
not come close to sharp attention.

How it is measured: FLOPs are counted from the sizes, averages, softmax and outer sums included. CPU time is on one
thread, the median of a few calls where they are short. Peak extra memory is what the process held more than before
the call, the output included (Linux). The centred error is |O - F| / |F - v| over 64 sampled queries: O the output,
F full attention, v the mean of the values, so that answering with the mean scores 1.
"""


def register(commands: Any) -> None:
    """Add the command to the commands of the package.

    Args:
        commands: What `argparse.ArgumentParser.add_subparsers` returns.
    """
    parser = commands.add_parser(
        "attend",
        help="run every operator on a video, a volume or any array, with a table and figures",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a recording; without it, packaged ones")
    parser.add_argument("--modes", help="names of the modes, 't h w', or their number; one more axis is channels")
    parser.add_argument("--key", help="which array of an .npz archive to take")
    parser.add_argument(
        "--operator",
        action="append",
        metavar="NAME[:OPTION=VALUE]",
        help=f"run this one only; may be given again: {', '.join(OPERATORS)}",
    )
    parser.add_argument("--dim", type=_positive, default=64, help="channels, all heads together (default 64)")
    parser.add_argument("--heads", type=_positive, default=4, help="heads (default 4)")
    parser.add_argument("--patch", help="sizes of a patch, '1,8,8' or one number for every mode (default: chosen)")
    parser.add_argument(
        "--logit-std", type=_deviation, default=1.0, help="standard deviation of the logits (default 1.0)"
    )
    parser.add_argument("--query", help="element whose attention is drawn, '15,120,160' (default: the middle)")
    parser.add_argument("--out", type=Path, default=Path("attend-out"), help="directory of figures (attend-out)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the random maps and queries (default 0)")
    parser.set_defaults(run=run)


def _whole(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _positive(text: str) -> int:
    """Read a positive whole number."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _deviation(text: str) -> float:
    """Read a positive number up to which float32 still tells logits apart."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number <= LARGEST_DEVIATION:
        raise argparse.ArgumentTypeError(f"must be positive and at most {LARGEST_DEVIATION:,.0f}, got {text}")
    return number


def _seed(text: str) -> int:
    """Read a seed."""
    number = _whole(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**63, got {number}")
    return number


def _recordings(arguments: argparse.Namespace, settings: Settings) -> list[tuple[Recording, Settings]]:
    """Load what was asked for, each with its settings."""
    if arguments.file is not None:
        modes = None if arguments.modes is None else parse_modes(arguments.modes)
        return [(load(arguments.file, modes=modes, key=arguments.key), settings)]
    for option in ("modes", "key", "query"):
        if getattr(arguments, option) is not None:
            raise OptionError(f"--{option} needs a FILE: the packaged recordings have their own.")
    return [
        (sample(), replace(settings, patch=patch if settings.patch is None else settings.patch, query=query))
        for sample, patch, query in PACKAGED
    ]


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Args:
        arguments: What the parser read.

    Returns:
        The exit status.
    """
    named = arguments.operator
    settings = Settings(
        default_choices() if named is None else parse_choices(named),
        lenient=named is None,
        dim=arguments.dim,
        heads=arguments.heads,
        logit_std=arguments.logit_std,
        seed=arguments.seed,
        patch=arguments.patch,
        query=arguments.query,
    )
    check_directory(arguments.out)
    require("matplotlib.figure", extra="examples", purpose="drawing figures")
    tqdm = require("tqdm", extra="examples", purpose="the progress bar")
    work = [prepare(recording, chosen) for recording, chosen in _recordings(arguments, settings)]
    reports, files = [], {}
    with tqdm.tqdm(total=sum(STEPS + len(each.flops) for each in work), unit="step", leave=False) as bar:
        for each in work:
            text, figures = examine(each, _Progress(bar, each.recording.name))
            reports.append(text)
            files.update({name: png_bytes(figure) for name, figure in figures.items()})
            bar.update(1)
    report = "\n\n".join(reports) + "\n"
    files["report.txt"] = report.encode()
    written = write_files(arguments.out, files)
    print(report)
    print("written:", *(f"  {path}" for path in written), sep="\n")
    return 0


class _Progress:
    """Moves a progress bar on whenever a piece of work starts, since the one before has ended."""

    def __init__(self, bar: Any, name: str) -> None:
        self.bar, self.name, self.started = bar, name, False

    def __call__(self, work: str) -> None:
        """Show what starts now."""
        self.bar.update(int(self.started))
        self.bar.set_description(f"{self.name}: {work}")
        self.started = True
