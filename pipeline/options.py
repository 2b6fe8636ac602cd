"""The command line's options, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_ALGORITHM, _MEASUREMENT, _RUN = "Algorithm (default: the task's settings)", "Measurement", "Run"
_SEVERAL = "Several processes (docs/several-machines.md)"
SNAPSHOT_STEPS, TIMEOUT = 50, 600.0


def _option(panel: str | None, help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, metavar=metavar, help=help_text, rich_help_panel=panel, show_default=False)


MODEL_TEXT = "A shipped prior (fashion), or the folder of a bundle."
Model = Annotated[str, _option(None, MODEL_TEXT, "--model", "-m", metavar="NAME|BUNDLE")]
AnyModel = Annotated[str | None, _option(None, MODEL_TEXT, "--model", "-m", metavar="NAME|BUNDLE")]
TaskName = Annotated[
    str | None,
    _option(
        None,
        "What to reconstruct from, as `rlsd tasks` lists, or two: sr4+jpeg.",
        "--task",
        "-t",
        metavar="NAME[+NAME]",
    ),
]
Operator = Annotated[
    str | None,
    _option(None, "Your own operator instead of a task (docs/own-operators.md).", "--operator", metavar="PY:NAME"),
]
Inputs = Annotated[
    list[Path],
    _option(
        None,
        "Images (or measurements, with --measured): PNG, JPEG, TIFF or NPY; floating-point ones in [-1, 1].",
        "--input",
        "-i",
        metavar="FILE...",
    ),
]
BatchInputs = Annotated[
    list[str],
    _option(
        None,
        "A folder, a pattern, files, a manifest (.csv) or zarr arrays; docs/batch.md.",
        "--input",
        "-i",
        metavar="DIR|GLOB|CSV|FILE...",
    ),
]
Out = Annotated[Path, _option(None, "Folder for the results; new or empty.", "--out", "-o", metavar="DIR")]
BatchOut = Annotated[
    Path,
    _option(
        None,
        "Folder for the results: new, empty, or that of the same batch, which then goes on.",
        "--out",
        "-o",
        metavar="DIR",
    ),
]
Overwrite = Annotated[
    bool, _option(None, "Replace items and reports of an earlier run in --out.", "--overwrite", metavar="")
]

Measured = Annotated[
    bool, _option(_MEASUREMENT, "The inputs are measurements; nothing is simulated.", "--measured", metavar="")
]
Sigma = Annotated[
    float | None,
    _option(_MEASUREMENT, "Standard deviation of the noise (images span [-1, 1]).", "--sigma", metavar="S"),
]
Mask = Annotated[
    list[Path] | None,
    _option(
        _MEASUREMENT,
        "The mask instead of the task's own: white or 1 is observed. Once for all inputs, or once for each.",
        "--mask",
        metavar="FILE",
    ),
]
BatchMask = Annotated[
    list[Path] | None,
    _option(
        _MEASUREMENT,
        "The mask instead of the task's own, for all items: white or 1 is observed. "
        "A manifest's column `mask` gives each its own.",
        "--mask",
        metavar="FILE",
    ),
]
Parameter = Annotated[
    list[str] | None,
    _option(
        _MEASUREMENT,
        "Any parameter of the operator, as --mask; a blur's kernel is a point's image.",
        "--param",
        metavar="NAME=FILE",
    ),
]

Particles = Annotated[
    int | None, _option(_ALGORITHM, "Reconstructions of each input.", "--particles", "-n", metavar="N")
]
Steps = Annotated[int | None, _option(_ALGORITHM, "Timesteps; the last is not visited.", "--steps", metavar="K")]
Gamma = Annotated[float | None, _option(_ALGORITHM, "Strength of the repulsion; 0: none.", "--gamma", metavar="G")]
RepulsionUntil = Annotated[
    float | None,
    _option(
        _ALGORITHM, "Share of the steps with repulsion, 0 to 1; 1 if not given.", "--repulsion-until", metavar="SHARE"
    ),
]
Repulsion = Annotated[
    str | None,
    _option(_ALGORITHM, "Where distances are measured.", "--repulsion", metavar="auto|features|latent"),
]
Rho = Annotated[float | None, _option(_ALGORITHM, "Weight of the coupling x to D(z).", "--rho", metavar="X")]
Lambda = Annotated[float | None, _option(_ALGORITHM, "Weight of the prior's score.", "--lambda", metavar="X")]
LrX = Annotated[float | None, _option(_ALGORITHM, "Adam's learning rate of the images.", "--lr-x", metavar="X")]
LrZ = Annotated[float | None, _option(_ALGORITHM, "Adam's learning rate of the latents.", "--lr-z", metavar="X")]
Variant = Annotated[
    str | None,
    _option(_ALGORITHM, "With images beside the latents, or latents only.", "--variant", metavar="rlsd|rlsd-nonaug"),
]
Label = Annotated[
    str | None, _option(_ALGORITHM, "Condition the prior; `rlsd info BUNDLE` lists classes.", "--class", metavar="NAME")
]
Prompt = Annotated[
    str | None, _option(_ALGORITHM, "Condition the prior on a text (needs torch).", "--prompt", metavar="TEXT")
]
TextEncoder = Annotated[
    str | None,
    _option(
        _ALGORITHM,
        "Checkpoint whose text encoder reads the prompt; default: the one that the bundle was made from.",
        "--text-encoder",
        metavar="DIR|OWNER/NAME@COMMIT",
    ),
]
Guidance = Annotated[
    float | None, _option(_ALGORITHM, "Guidance scale towards the class or prompt; 1: off.", "--guidance", metavar="X")
]

Distributed = Annotated[
    bool,
    _option(_SEVERAL, "This is one of the processes of torchrun, which share one input.", "--distributed", metavar=""),
]
Snapshots = Annotated[
    Path | None, _option(_SEVERAL, "Folder of snapshots; default: OUT.snapshots.", "--snapshots", metavar="DIR")
]
SnapshotSteps = Annotated[
    int | None,
    _option(_SEVERAL, f"Steps between two snapshots; {SNAPSHOT_STEPS} if not given.", "--snapshot-steps", metavar="K"),
]
Timeout = Annotated[
    float | None,
    _option(_SEVERAL, f"Seconds to wait for another process; {TIMEOUT:g} if not given.", "--timeout", metavar="S"),
]

Lpips = Annotated[
    Path | None,
    _option(
        _RUN,
        "Weights of the perceptual distance LPIPS (docs/metrics.md): report it as well.",
        "--lpips",
        metavar="FILE|DIR",
    ),
]
Seed = Annotated[int, _option(_RUN, "All random numbers derive from it; 0 if not given.", "--seed", metavar="S")]
Device = Annotated[
    str | None,
    _option(_RUN, "cpu, or cuda:0 and so on; default: what the bundle was exported for.", "--device", metavar="D"),
]
Threads = Annotated[int, _option(_RUN, "Worker threads; one per processor if not given.", "--threads", metavar="T")]
Pictures = Annotated[bool, _option(_RUN, "Particles and mean of each item as PNG, too.", "--pictures", metavar="")]
Workers = Annotated[
    int, _option(_RUN, "Processes, each with an engine of its own: one for each GPU, say.", "--workers", metavar="W")
]
Ray = Annotated[
    str | None,
    _option(
        _RUN,
        "The workers run on a Ray cluster: its address, auto, or local for this machine.",
        "--ray",
        metavar="ADDRESS|local",
    ),
]
SnapshotEvery = Annotated[
    float,
    _option(_RUN, "Seconds between snapshots of an item under way; 60 if not given.", "--snapshot-every", metavar="S"),
]
Root = Annotated[
    Path | None,
    _option(_RUN, "What the manifest's paths are relative to and may not leave; its folder.", "--root", metavar="DIR"),
]
Metrics = Annotated[
    str | None, _option(_RUN, "For Prometheus: a file, or a port of this machine.", "--metrics", metavar="FILE|PORT")
]
Log = Annotated[Path | None, _option(_RUN, "What happens, as JSON lines.", "--log", metavar="FILE")]
