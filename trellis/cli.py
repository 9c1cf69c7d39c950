"""The `trellis` command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _trellis() -> None:
    """Turn a picture or a sentence into a 3D asset."""


@app.command()
def generate(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder, or one file such as chair.glb.")],
    photos: Annotated[
        list[Path] | None, typer.Argument(help="Photos; each becomes an asset (see --one-object).")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A sentence instead of photos; several times: several assets.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub repository; default: the bundled model.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same asset.")] = 42,
    steps: Annotated[int | None, typer.Option(help="Sampling steps of both stages.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance strength of both stages.")] = None,
    formats: Annotated[
        str,
        typer.Option(help="Files to write, of: glb, obj, stl, ply (Gaussians), png (preview), rf (radiance field)."),
    ] = "glb,ply,png",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if every operator runs there.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: float32 on a CPU.")] = "auto",
    video: Annotated[bool, typer.Option("--video", help="Also write turntable.mp4.")] = False,
    one_object: Annotated[bool, typer.Option("--one-object", help="The photos show one object.")] = False,
    mode: Annotated[str, typer.Option(help="With --one-object: stochastic or multidiffusion.")] = "stochastic",
    max_voxels: Annotated[int, typer.Option(help="More occupied voxels than this is an error.")] = 32_768,
    max_pixels: Annotated[int | None, typer.Option(help="Largest photo accepted, in pixels.")] = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Hold one model at a time.")] = False,
    memory: Annotated[
        str | None, typer.Option(help="How much of the GPU's memory to use, such as 8GB; models wait on the host.")
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more, and show tracebacks.")] = False,
) -> None:
    """Make 3D assets from photos, or from sentences."""
    from trellis.commands.generate import Request, run

    if bool(photos) == bool(text):
        raise typer.BadParameter("give photos, or sentences with --text")
    _log(verbose)
    request = Request(
        photos=photos or [],
        texts=text or [],
        output=output,
        model=model,
        seed=seed,
        steps=steps,
        guidance=guidance,
        formats=tuple(name.strip() for name in formats.split(",") if name.strip()),
        device=device,
        dtype=dtype,
        video=video,
        one_object=one_object,
        mode=mode,
        max_voxels=max_voxels,
        max_pixels=max_pixels,
        low_memory=low_memory,
        memory=memory,
        verbose=verbose,
    )
    raise typer.Exit(run(request))


@app.command()
def render(
    assets: Annotated[
        list[Path],
        typer.Argument(
            help="Meshes (.glb .gltf .obj .stl .ply), Gaussians (.ply), radiance fields (.safetensors) or folders"
            " written by `trellis generate`; several stand side by side."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="turn.mp4, turn.gif, or a contact sheet: sheet.png.")],
    frames: Annotated[int, typer.Option(help="Frames of the turn, for .mp4 and .gif.")] = 300,
    views: Annotated[int, typer.Option(help="Views of a contact sheet.")] = 4,
    resolution: Annotated[int, typer.Option(help="Pixels per side of each picture.")] = 512,
    ssaa: Annotated[
        int | None, typer.Option(help="Samples per side of a pixel; default: 1 for Gaussians, 2 for the others.")
    ] = None,
    background: Annotated[str, typer.Option(help="black, white, #rrggbb; random: black or white per view.")] = "black",
    what: Annotated[str, typer.Option(help="color, normal (meshes), depth or alpha.")] = "color",
    fit: Annotated[
        bool, typer.Option("--fit", help="Move and scale meshes of other programs into the picture.")
    ] = False,
    fps: Annotated[int, typer.Option(help="Frames per second, for .mp4 and .gif.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the random background.")] = 42,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if every operator runs there.")
    ] = "auto",
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more, and show tracebacks.")] = False,
) -> None:
    """Show 3D assets: a turn around them, or views on one sheet."""
    from trellis.commands.render import Request, run

    _log(verbose)
    request = Request(
        assets=assets,
        output=output,
        frames=frames,
        views=views,
        resolution=resolution,
        ssaa=ssaa,
        background=background,
        what=what,
        fit=fit,
        fps=fps,
        seed=seed,
        device=device,
        verbose=verbose,
    )
    raise typer.Exit(run(request))


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A training configuration (.json), or the name of a shipped one.")],
    data: Annotated[list[Path], typer.Option(help="Folder written by `trellis prepare`; may be repeated.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run: checkpoints, log, samples.")],
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps in all.")] = None,
    load: Annotated[
        str | None, typer.Option(help="Weights to start from: another run's folder, or a model (stem, Hub path).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if every operator runs there.")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, fp16, amp; auto: the configuration's on a GPU, fp32 on a CPU.")
    ] = "auto",
    parallel: Annotated[
        str, typer.Option(help="Under torchrun: ddp, each process has the whole model, or fsdp2, it is divided.")
    ] = "ddp",
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read samples; 0: a thread of this one.")] = 0,
    time_limit: Annotated[float | None, typer.Option(help="Minutes after which to save and stop.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard files.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more, and show tracebacks.")] = False,
) -> None:
    """Train the models of a configuration; Ctrl-C saves and stops."""
    from trellis.commands.train import Request, run

    _log(verbose)
    request = Request(
        config=config,
        data=data,
        output=output,
        steps=steps,
        load=load,
        resume=resume,
        device=device,
        precision=precision,
        parallel=parallel,
        threads=threads,
        workers=workers,
        minutes=time_limit,
        tensorboard=tensorboard,
        verbose=verbose,
    )
    raise typer.Exit(run(request))


@app.command()
def prepare(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder of GLB, glTF, OBJ, PLY, STL files; sweethome3d (installed), or a folder or .deb of it."
            " Left out: go on with what is in the data folder."
        ),
    ] = None,
    data: Annotated[Path, typer.Option("-o", "--data", help="The prepared folder.")] = Path("data"),
    steps: Annotated[
        str,
        typer.Option(help="Of: render, render_cond, voxelize, features, conditions, structure_latents, latents."),
    ] = "render,render_cond,voxelize",
    choose: Annotated[str, typer.Option("--filter", help="all; furniture: 200-60k faces, colored, no doors.")] = "all",
    variants: Annotated[int, typer.Option(help="Turned, mirrored, stretched, recolored copies of each object.")] = 0,
    views: Annotated[int, typer.Option(help="Renders of each object.")] = 150,
    resolution: Annotated[int, typer.Option(help="Pixels per side of a render.")] = 512,
    ssaa: Annotated[int, typer.Option(help="Samples per side of a pixel.")] = 2,
    depth: Annotated[bool, typer.Option("--depth", help="Also keep depths, for the visibility of features.")] = False,
    cond_views: Annotated[int, typer.Option(help="Conditioning pictures of each object.")] = 24,
    cond_resolution: Annotated[int, typer.Option(help="Pixels per side of them.")] = 1024,
    cond_azimuth: Annotated[float, typer.Option(help="At most so many degrees from the front.")] = 180.0,
    cond_elevation: Annotated[str, typer.Option(help="Lowest and highest elevation in degrees.")] = "-90,90",
    voxel_resolution: Annotated[int, typer.Option(help="Voxels per side.")] = 64,
    feature_model: Annotated[str, typer.Option(help="Whose features are back-projected.")] = "dinov2_vitl14_reg",
    image_encoder: Annotated[str, typer.Option(help="Whose tokens of the pictures are kept.")] = "dinov2_vitl14_reg",
    text_encoder: Annotated[str, typer.Option(help="Whose tokens of the captions are kept.")] = "",
    augmentations: Annotated[int, typer.Option(help="Changed copies of each conditioning picture.")] = 0,
    structure_encoder: Annotated[str, typer.Option(help="Trained structure encoder, without suffix.")] = "",
    latent_encoder: Annotated[str, typer.Option(help="Trained latent encoder, without suffix.")] = "",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    jobs: Annotated[int, typer.Option("-j", "--jobs", help="Worker processes.")] = 1,
    limit: Annotated[int | None, typer.Option(help="At most so many objects in this run.")] = None,
    rank: Annotated[int, typer.Option(help="Of this machine, from 0.")] = 0,
    world_size: Annotated[int, typer.Option(help="How many machines share the work.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Run on a Ray cluster: its address, or local.")] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more, and show tracebacks.")] = False,
) -> None:
    """Turn 3D objects into training data: renders, voxels, features, latents."""
    from trellis.commands.prepare import Request, run

    _log(verbose)
    options = {
        "variants": variants,
        "views": views,
        "resolution": resolution,
        "ssaa": ssaa,
        "depth": depth,
        "cond_views": cond_views,
        "cond_resolution": cond_resolution,
        "cond_azimuth": cond_azimuth,
        "cond_elevation": cond_elevation,
        "voxel_resolution": voxel_resolution,
        "feature_model": feature_model,
        "image_encoder": image_encoder,
        "text_encoder": text_encoder,
        "augmentations": augmentations,
        "structure_encoder": structure_encoder,
        "latent_encoder": latent_encoder,
        "seed": seed,
    }
    request = Request(
        source=source,
        data=data,
        steps=tuple(name.strip() for name in steps.split(",") if name.strip()),
        options=options,
        choose=choose,
        jobs=jobs,
        rank=rank,
        world_size=world_size,
        limit=limit,
        ray=ray,
        verbose=verbose,
    )
    raise typer.Exit(run(request))


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Prepared folder; its held-out objects (split test) are measured.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub repository; default: the bundled model.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many objects, evenly chosen.")] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Of: mean_shape, retrieval, structure_vae, slat_vae, latent_flow, image_to_3d, text_to_3d;"
            " default: all."
        ),
    ] = "",
    sheet: Annotated[bool, typer.Option("--sheet", help="Also write contact_sheet.png.")] = False,
    seed: Annotated[int, typer.Option(help="Of all sampling.")] = 42,
    steps: Annotated[int | None, typer.Option(help="Sampling steps of both flows; default: the model's.")] = None,
    structure_encoder: Annotated[
        str, typer.Option(help="Stem of the structure VAE's encoder; default: the prepared folder's.")
    ] = "",
    latent_model: Annotated[
        str, typer.Option(help="Folder in DATA/latents; default: that of the prepared folder's settings.")
    ] = "",
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more, and show tracebacks.")] = False,
) -> None:
    """Measure a model on objects it has not seen, beside retrieval and the mean shape."""
    from trellis.commands.evaluate import Request, run

    _log(verbose)
    request = Request(
        data=data,
        output=output,
        model=model,
        limit=limit,
        only=only,
        sheet=sheet,
        seed=seed,
        steps=steps,
        structure_encoder=structure_encoder,
        latent_model=latent_model,
        verbose=verbose,
    )
    raise typer.Exit(run(request))


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Folder written by `trellis prepare`; with --unpack: of shards.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the shards; with --unpack: to prepare.")],
    objects: Annotated[int, typer.Option(help="Objects in each shard.")] = 256,
    include: Annotated[
        str,
        typer.Option(
            help="What goes in, of: voxels, renders, renders_cond, features, latents, ss_latents, conditions;"
            " default: all."
        ),
    ] = "",
    unpack: Annotated[bool, typer.Option("--unpack", help="Shards into a prepared folder instead.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more, and show tracebacks.")] = False,
) -> None:
    """Pack a prepared folder into tar shards, which `trellis train` reads as it reads the folder."""
    from trellis.commands.pack import Request, run

    _log(verbose)
    kinds = tuple(name.strip() for name in include.split(",") if name.strip())
    raise typer.Exit(run(Request(source, output, objects, kinds, unpack, verbose)))


@app.command()
def doctor() -> None:
    """Say what is compiled, which device there is, which kernel serves which operator, which models are cached."""
    from trellis.commands.doctor import run

    raise typer.Exit(run())


def _log(verbose: bool) -> None:
    from rich.logging import RichHandler

    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)])


def main() -> None:
    app()
