"""A run -> a folder in the layout of the Hugging Face Hub, which diffusers loads without this package."""

import html
import json
import re
from pathlib import Path

import torch
from diffusers import VQModel
from torch import Tensor

import mutor_vision
from mutor_vision.data.images import grid, save_png
from mutor_vision.errors import UserError
from mutor_vision.interop import hub_pipeline
from mutor_vision.interop.hub_pipeline import MutorTransformer
from mutor_vision.interop.one_file import one_file
from mutor_vision.model.transformer import Transformer, num_parameters
from mutor_vision.names import in_words, printable, title
from mutor_vision.runtime import Runtime
from mutor_vision.sampling.load import LoadedModel, load
from mutor_vision.sampling.stream import spread_classes
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json, written_folder
from mutor_vision.storage.outputs import check_new
from mutor_vision.tokenizer.model import VQTokenizer

COLUMNS = 4  # images of each class in the card's grid


class MutorPipeline(hub_pipeline.MutorPipeline):
    """hub_pipeline.MutorPipeline, which saves its code as one file that needs no `mutor_vision`."""

    def _code(self) -> str:
        return one_file(hub_pipeline.__name__, ["MutorTransformer", "MutorPipeline"],
                        f"Made by mutor_vision {mutor_vision.__version__}: its own sources, in one file.")  # fmt: skip


def pipeline_of(path: str | Path, weights: str = "best", adapter: str | Path = "") -> MutorPipeline:
    """A run or checkpoint -> MutorPipeline on the CPU in float32. weights, adapter: as sampling.load.load has them."""
    loaded = _load(path, weights, adapter)
    return _pipeline(loaded)


def export(path: str | Path, target: Path, *, weights: str = "best", adapter: str = "", metrics: str = "",
           licence: str = "", samples: bool = True) -> None:  # fmt: skip
    """Write the folder `target`, which must not exist. metrics: a result of `mutor fid --json` for the card. licence:
    an identifier of the Hub, '' = the card says that there is none yet. samples: draw a grid for the card."""
    check_new(target)
    scores = read_json(Path(metrics)) if metrics else None
    loaded = _load(path, weights, adapter)
    pipeline = _pipeline(loaded)
    with written_folder(target) as folder:
        pipeline.save_pretrained(folder)
        if samples:
            pipeline.set_progress_bar_config(disable=True)
            save_png(_samples(pipeline, loaded), folder / "samples.png")
        (folder / "README.md").write_text(card(loaded, target.name, scores, licence, samples), encoding="utf-8")


def _load(path, weights: str, adapter) -> LoadedModel:
    return load(path, Runtime(0, 1, torch.device("cpu"), None), weights, adapter, pack=False)


def _pipeline(loaded: LoadedModel) -> MutorPipeline:
    config = loaded.config.model
    transformer = MutorTransformer(
        config.layers, config.heads, config.dim, config.vocab_size, config.num_classes, config.grid, config.rope_base
    )
    checkpoint.load_strictly(transformer.model, loaded.transformer.state_dict(), loaded.identity["run"])
    names = dict(enumerate(map(in_words, loaded.class_names)))
    return MutorPipeline(vq_model(loaded.tokenizer), transformer.eval(), names, bool(loaded.config.label_dropout))


def vq_model(tokenizer: VQTokenizer) -> VQModel:
    """The same network as diffusers names it: equal codes, and pixels equal but for rounding. Raises UserError for a
    quantizer that VQModel has not."""
    config = tokenizer.config
    if config.quantizer != "vq":
        raise UserError(f"the tokenizer's quantizer is '{config.quantizer}'; diffusers.VQModel has only 'vq'")
    levels = len(config.channels)
    down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    if config.attention:
        down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    model = VQModel(
        in_channels=3, out_channels=3, down_block_types=tuple(down), up_block_types=tuple(up),
        block_out_channels=config.channels, layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels, sample_size=config.image_size,
        num_vq_embeddings=config.codebook_size, norm_num_groups=config.norm_groups, vq_embed_dim=config.code_dim,
        mid_block_add_attention=config.attention, lookup_from_codebook=True, scaling_factor=1.0,
    )  # fmt: skip
    weights: dict[str, Tensor] = dict(tokenizer.state_dict())
    # Unit codes: the nearest of them to a latent is the one at the smallest angle, whatever the latent's length.
    weights.pop("quantizer.codebook")
    all_codes = torch.arange(config.codebook_size)[None, None]
    weights["quantize.embedding.weight"] = tokenizer.quantizer.lookup(all_codes)[0, :, 0].T.contiguous()
    checkpoint.load_strictly(model, weights, "the tokenizer")
    return model.eval()


def _samples(pipeline: MutorPipeline, loaded: LoadedModel):
    classes = spread_classes(len(loaded.class_names), 8)
    scale = 2.0 if loaded.config.label_dropout else 1.0
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(list(classes), COLUMNS, cfg_scale=scale, generator=generator, output_type="pt")
    assert not isinstance(drawn, tuple)  # which return_dict=False gives
    pixels = (drawn.images * 255).round().to(torch.uint8)
    return grid(pixels, COLUMNS, [title(loaded.class_names[number]) for number in classes])


def card(loaded: LoadedModel, name: str, scores: dict | None, licence: str, samples: bool) -> str:
    """The model card, README.md, of a folder called `name`: what the run itself knows, and nothing else."""
    config, identity = loaded.config, loaded.identity
    names = [in_words(name) for name in loaded.class_names]
    head = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation",
            "tags": ["mutor-vision", "autoregressive", "class-conditional"]}  # fmt: skip
    head |= {"license": licence} if licence else {}
    height, width = loaded.image_size
    steps, batch = config.steps, config.batch_size
    auxiliary = [f"`{field}`: {value}" for field, value in config.auxiliaries.items() if value.active]
    first = json.dumps(names[0], ensure_ascii=printable(names[0]) != names[0])
    scale = "" if config.label_dropout else ", cfg_scale=1"
    lines = [
        "---", json.dumps(head, indent=1), "---", f"# {name}",
        f"Class-conditional images of {width}x{height} pixels, {len(names):,} classes: an autoregressive transformer "
        f"of {_parameters(loaded.transformer)} parameters over the {config.model.grid[0]}x{config.model.grid[1]} codes "
        f"({config.model.vocab_size:,} different ones) of a VQ tokenizer.",
        *(["![Samples of classes spread over all, none selected, seed 0](samples.png)"] if samples else []),
        "## Use", "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)\n'
        f"images = pipeline([{first}, {len(names) - 1}], num_images_per_class=2"
        f"{scale}, generator=torch.Generator().manual_seed(0)).images\n```",
        "It needs torch and diffusers. diffusers copies the code of this folder, one file, to `HF_HOME` before it runs "
        "it; where the home folder cannot be written, set `HF_HOME` to one that can. "
        "A new generator with seed *s* draws the images of `mutor sample --seed s`.",
        "## Training",
        f"- data: {len(names):,} classes ({_plain(_some([title(name) for name in loaded.class_names]))}); token set "
        f"{_plain(Path(config.codes).name) or 'unknown'}",
        f"- {steps:,} steps of {batch:,} images, learning rate {config.lr:g} ({config.schedule}), label dropout "
        f"{config.label_dropout:g}, seed {config.seed}",
        f"- objective: next token{'; ' + '; '.join(auxiliary) if auxiliary else ', nothing else'}",
        f"- weights: `{identity['weights']}` of {_plain(identity['run'])}/{identity['checkpoint']}, sha256 "
        f"`{identity['weights_sha256']}`; tokenizer sha256 `{identity['tokenizer_sha256']}`",
        "## Metrics",
        *([f"```json\n{json.dumps(scores, indent=1)}\n```"] if scores else
          ["None were given. `mutor fid --json FILE` makes them, `mutor export --metrics FILE` writes them here."]),
        "## Intended use and limits",
        "Research on image generation. It draws what its training images show, with their biases and their errors, "
        "and nothing was done to prevent likenesses of them. Do not pass its images off as photographs.",
        "## Licence",
        f"{licence}." if licence else "Not stated yet: whoever publishes this folder must choose one, and respect the "
        "terms of the training images.",
    ]  # fmt: skip
    return "\n\n".join(lines).replace("---\n\n{", "---\n{").replace("}\n\n---", "}\n---") + "\n"


def _plain(text: str) -> str:
    """Others' text in Markdown, where a name could be a tag, a link or a heading."""
    return re.sub(r"([\\`*_\[\]~#])", r"\\\1", html.escape(printable(text), quote=False))


def _parameters(transformer: Transformer) -> str:
    count = num_parameters(transformer)
    return f"{count / 1e6:,.0f} million" if count >= 1e7 else f"{count:,}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
