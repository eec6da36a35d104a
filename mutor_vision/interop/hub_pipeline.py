"""A trained model as a pipeline of diffusers. `mutor export` writes this module, with what it uses of the others, into
the folder that it makes (`one_file`), where it is loaded without this package: it imports nothing inside functions.

Legend: B images, h x w grid, H x W pixels.
"""

import copy
import hashlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

from mutor_vision.config import TransformerConfig
from mutor_vision.data.images import to_uint8
from mutor_vision.errors import UserError
from mutor_vision.model.attention import rope_table
from mutor_vision.model.prepare import prepare
from mutor_vision.model.transformer import Transformer
from mutor_vision.names import match_class
from mutor_vision.sampling.decode import Plain
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.generate import generate


class MutorTransformer(ModelMixin, ConfigMixin):
    """The class-conditional transformer: `model` is model.transformer.Transformer, without dropout."""

    @register_to_config
    def __init__(self, layers: int = 12, heads: int = 12, dim: int = 768, vocab_size: int = 16384,
                 num_classes: int = 1000, grid: tuple[int, int] = (16, 16), rope_base: float = 10000.0):  # fmt: skip
        super().__init__()
        self.model = Transformer(TransformerConfig(
            layers, heads, dim, vocab_size, num_classes, (grid[0], grid[1]), token_dropout=0.0, residual_dropout=0.0,
            ffn_dropout=0.0, rope_base=rope_base,
        ))  # fmt: skip

    def forward(self, tokens: Tensor, labels: Tensor | None, positions: Tensor) -> Tensor:
        """As Transformer.forward, without cache: logits (B, T, V)."""
        return self.model(tokens, labels, positions)


class MutorPipeline(DiffusionPipeline):
    """Class labels -> images."""

    def __init__(self, tokenizer: VQModel, transformer: MutorTransformer, id2label: dict | None = None,
                 guided: bool = True):  # fmt: skip
        """id2label: class id -> name. guided: whether the model has learnt the null class that guidance needs."""
        super().__init__()
        self.register_modules(tokenizer=tokenizer, transformer=transformer)
        names = {int(number): name for number, name in (id2label or {}).items()}
        count = transformer.config.num_classes
        self.id2label = {number: names.get(number, str(number)) for number in range(count)}
        self.register_to_config(id2label={str(k): v for k, v in self.id2label.items()}, guided=guided)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_images_per_class: int = 1,
        cfg_scale: float = 2.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """class_labels: ids in [0, num_classes), or names as `mutor sample --classes` takes them; each gives
        num_images_per_class images, in this order.

        generator: a new one, torch.Generator().manual_seed(s), draws image i as `mutor sample --seed s` does; one that
        was used before gives other images. A list has one for every image. cfg_scale: 1 = no guidance. temperature: 0 =
        greedy. top_k 0 and top_p 1 = all codes.

        output_type: 'pil'; 'pt' float32 (B, 3, H, W) in [0, 1]; 'np' the same as (B, H, W, 3); 'codes' int64 (B, h, w).
        Raises ValueError for an unknown class and for settings out of range."""
        if output_type not in ("pil", "pt", "np", "codes"):
            raise UserError(f"output_type is '{output_type}', expected pil, pt, np or codes")
        settings = SampleSettings(cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p)
        if cfg_scale != 1 and not self.config.guided:
            raise UserError("the model was trained without a null class; use cfg_scale=1")
        wanted = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
        names = [self.id2label[number] for number in range(len(self.id2label))]
        chosen = [match_class(str(label), names) if isinstance(label, str) else int(label) for label in wanted]
        if outside := [label for label in chosen if not 0 <= label < len(names)]:
            raise UserError(f"class {outside[0]} does not exist; this model has classes 0 to {len(names) - 1}")
        device = self._execution_device
        labels = torch.tensor(chosen, device=device).repeat_interleave(num_images_per_class)
        codes = self._codes(labels, settings, generator)
        if output_type == "codes":
            images: Any = codes
        else:
            pixels = self._pixels(codes)
            if output_type == "pil":
                images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
            else:
                images = pixels.float() / 255
                images = images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _codes(self, labels: Tensor, settings: SampleSettings, generator) -> Tensor:
        """(B,) -> (B, h, w)."""
        model = self._drawing_model()
        if not isinstance(generator, (list, tuple)):
            parts = [(labels, _seed(generator), np.arange(len(labels)))]
        elif len(generator) != len(labels):
            raise UserError(f"generator has {len(generator)} generators, expected one for each of {len(labels)} images")
        else:
            parts = [(labels[i : i + 1], _seed(each), np.arange(1)) for i, each in enumerate(generator)]
        with self.progress_bar(total=len(parts) * model.config.num_tokens) as bar:
            decoder = Plain(watch=lambda codes: bar.update())
            return torch.cat([generate(model, part, settings, seed=seed, indices=indices, decoder=decoder)
                              for part, seed, indices in parts])  # fmt: skip

    def _drawing_model(self) -> Transformer:
        """The transformer as `mutor sample` prepares it, with the same weights; the component itself stays as it is,
        so that it can be saved and moved."""
        model = self.transformer.model
        model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()}).eval()
        # A pipeline in bfloat16 has rounded its tables, too, and a rotation needs its angles.
        model.rope = rope_table(model.config.grid, model.config.head_dim, model.config.rope_base).to(model.rope.device)
        return prepare(model, None)

    def _pixels(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> uint8 (B, 3, H, W). One by one on a CPU, whose kernels round differently per batch size."""
        parts = codes.split(1 if codes.device.type == "cpu" else 16)
        width = self.tokenizer.config.vq_embed_dim
        decoded = (self.tokenizer.decode(part, force_not_quantize=True, shape=(*part.shape, width)) for part in parts)
        return torch.cat([to_uint8(each.sample.float().clamp_(-1, 1)) for each in decoded])

    def save_pretrained(self, save_directory: str | Path, **settings) -> None:
        """As DiffusionPipeline.save_pretrained, with the code beside the weights: the folder is loaded by
        DiffusionPipeline.from_pretrained(save_directory, trust_remote_code=True)."""
        if settings.get("push_to_hub"):
            raise UserError("push_to_hub would send a folder without its code; save it, then upload the folder")
        folder, code = Path(save_directory), self._code()
        super().save_pretrained(folder, **settings)
        # All folders on a machine share one space of modules, so a name must mean one content.
        name = f"mutor_{hashlib.sha256(code.encode()).hexdigest()[:12]}"
        for place in (folder, folder / "transformer"):
            (place / f"{name}.py").write_text(code, encoding="utf-8")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index = {"_class_name": [name, "MutorPipeline"]} | {k: v for k, v in index.items() if k[0] != "_"} | {
            "_diffusers_version": index["_diffusers_version"], "transformer": [name, "MutorTransformer"],
            "tokenizer": ["diffusers", "VQModel"],
        }  # fmt: skip
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _code(self) -> str:
        return inspect.getsource(sys.modules[type(self).__module__])


def _seed(generator: torch.Generator | None) -> int:
    """A new generator stands for its seed; from one that was used, or none, a seed is drawn."""
    device = generator.device if generator is not None else torch.device("cpu")
    new = generator is not None and torch.equal(
        generator.get_state(), torch.Generator(device).manual_seed(generator.initial_seed()).get_state()
    )
    drawn = int(torch.randint(2**63 - 1, (1,), generator=generator, device=device))
    return generator.initial_seed() if generator is not None and new else drawn
