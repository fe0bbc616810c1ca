"""DiCo as a diffusers pipeline: network, scheduler and autoencoder in one folder that loads and generates.

The folder is what `dico-ray export --format diffusers` writes. Two ways in:

    from dico_ray.weights import load_pipeline
    pipe = load_pipeline("folder")

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("folder", custom_pipeline="folder", trust_remote_code=True)

    images = pipe(class_labels=[1, 2], guidance_scale=1.4, num_inference_steps=50).images
"""

# No `from __future__ import annotations` here: diffusers reads the annotations of a pipeline's arguments.

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers looks for these two names in the module of a component's class, to learn how it is loaded.
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from dico_ray.data.latents import decode
from dico_ray.diffusion import Diffusion, Guidance, Sampler, guided_output
from dico_ray.diffusion.schedule import FIRST_BETA, LAST_BETA
from dico_ray.models import DiCo

PIPELINE_FILE = '''\
"""Where diffusers finds this folder's pipeline. The classes are those of the package dico-ray."""

from dico_ray.pipeline import DiCoModel, DiCoPipeline, DiCoScheduler

__all__ = ["DiCoModel", "DiCoPipeline", "DiCoScheduler"]
'''

README = """\
# {model}, {weights} weights of step {step}

Exported by dico-ray {version} from the checkpoint with hash {hash}.
Autoencoder: {vae} ({known}).

With the package dico-ray installed:

    from dico_ray.weights import load_pipeline
    pipe = load_pipeline("this/folder")
    images = pipe(class_labels=[1, 2], guidance_scale=1.4, num_inference_steps=50).images

or, with diffusers' own loader, which runs this folder's `pipeline.py` (an import of the package):

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("this/folder", custom_pipeline="this/folder", trust_remote_code=True)

Guidance acts on the first three latent channels, as in the published figures; `guidance_channels="all"` is diffusers'
way. The weights in `unet/` have the names of the released checkpoints.
"""

Generators = torch.Generator | list[torch.Generator] | None


class DiCoModel(DiCo, ModelMixin, ConfigMixin):
    """`dico_ray.models.DiCo` with a config.json. Arguments as there; sample_size: height and width of its latents."""

    @register_to_config
    def __init__(
        self,
        hidden_size: int,
        depths: Sequence[int],
        ffn_ratio: int,
        num_classes: int = 1000,
        in_channels: int = 4,
        sample_size: int = 32,
    ) -> None:
        super().__init__(hidden_size, depths, ffn_ratio, num_classes, in_channels, class_dropout_prob=0.0)


class DiCoScheduler(SchedulerMixin, ConfigMixin):
    """`dico_ray.diffusion.Sampler` by diffusers' protocol: ADM's spacing and learned variance, or DDIM.

    diffusers' own DDIM scheduler takes steps of equal length, which ADM's spacing does not have (9% off in the
    latents of a random network at 50 steps). Its schedulers can still take this one's place by `from_config`: the
    config has their names for the same process.

    Args:
        num_train_timesteps: of the process.
        method: "ddpm" or "ddim".
        beta_start, beta_end, beta_schedule, prediction_type, timestep_spacing, clip_sample: facts, for others.

    Raises:
        ValueError: a fact that is not DiCo's.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        method: Literal["ddpm", "ddim"] = "ddpm",
        beta_start: float = FIRST_BETA,
        beta_end: float = LAST_BETA,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        clip_sample: bool = False,
    ) -> None:
        given = (beta_start, beta_end, beta_schedule, prediction_type, timestep_spacing, clip_sample)
        if given != (FIRST_BETA, LAST_BETA, "linear", "epsilon", "linspace", False):
            raise ValueError(f"the schedule is {given}; DiCo's is fixed: take one of diffusers' own schedulers")
        # Or `from_config` of another scheduler would put its own defaults, clipping and spacing, in their place.
        self.register_to_config(_use_default_values=[])
        self._diffusion = Diffusion(num_train_timesteps)
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Chooses the steps; `timesteps` is then int64 `(N,)`, descending. Raises ValueError for an impossible N."""
        self._sampler = Sampler(self._diffusion, num_inference_steps, self.config["method"])
        self._index = {t: i for i, t in enumerate(self._sampler.timesteps.tolist())}
        self.timesteps = torch.from_numpy(self._sampler.timesteps[::-1].copy()).to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """One step: latents `(B, C, H, W)` and the network's answer `(B, C or 2C, H, W)` -> `.prev_sample`."""

        def noise(_: int) -> Tensor:
            return randn_tensor(tuple(sample.shape), generator, sample.device, torch.float32)

        before = self._sampler.step(lambda *_: model_output, sample, self._index[int(timestep)], noise)
        return SimpleNamespace(prev_sample=before) if return_dict else (before,)


class DiCoPipeline(DiffusionPipeline):
    """Class labels -> images.

    Args:
        unet: the network.
        scheduler: `DiCoScheduler`, or one of diffusers' made by `from_config` of its config; what is to heed the
            learned variance, `DDPMScheduler`, with variance_type="learned_range".
        vae: a diffusers `AutoencoderKL`; None: the hub's `vae_id` is loaded when it is first needed.
        vae_id: hub id of the autoencoder.
        classes: list of the classes' names, in the order of their labels.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    unet: Any
    scheduler: Any
    vae: Any

    def __init__(self, unet: Any, scheduler: Any, vae: Any = None, vae_id: str = "", classes: Any = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(vae_id=vae_id, classes=classes or [])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 1.0,
        num_inference_steps: int = 250,
        guidance_channels: int | Literal["all"] = 3,
        guidance_interval: tuple[int, int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image for each label.

        Args:
            class_labels: in [0, num_classes]; num_classes means no class.
            guidance_scale, guidance_channels, guidance_interval: as in `dico_ray.diffusion.Guidance`.
            num_inference_steps: as the scheduler takes them, 1 .. 1000.
            generator: for the first noise and that of the steps; a list has one for each image.
            latents: standard normal noise `(B, C, H, W)` to start from, instead of a draw.
            output_type: "pil"; "np", float32 `(B, H, W, 3)` in [0, 1]; "pt", the same as `(B, 3, H, W)`; "latent",
                scaled latents `(B, C, h, w)` float32.

        Returns:
            An object with `.images`, or a tuple of it.

        Raises:
            ValueError: a label, a setting of the guidance or a number of steps that is impossible.
        """
        labels = torch.as_tensor(class_labels, dtype=torch.int64)
        highest = self.unet.config["num_classes"]
        if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() > highest:
            raise ValueError(f"class_labels are {class_labels}; give a list of numbers from 0 to {highest}")
        guidance = Guidance(guidance_scale, highest, guidance_channels, guidance_interval)
        labels = labels.to(self._execution_device)
        x = self._start(len(labels), generator, latents)
        x = self._denoise(x, labels, guidance, num_inference_steps, generator)
        images = x if output_type == "latent" else self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # pyright: ignore[reportArgumentType]

    def _start(self, count: int, generator: Generators, latents: Tensor | None) -> Tensor:
        """The first noise `(B, C, H, W)`, float32 whatever the network's dtype."""
        side = self.unet.config["sample_size"]
        shape = (count, self.unet.config["in_channels"], side, side)
        if latents is None:
            return randn_tensor(shape, generator, self._execution_device, torch.float32)
        if latents.ndim != 4 or latents.shape[:2] != shape[:2]:
            raise ValueError(f"latents are {tuple(latents.shape)}; these labels and this network need {shape}")
        return latents.to(self._execution_device, torch.float32)

    def _denoise(self, x: Tensor, labels: Tensor, guidance: Guidance, steps: int, generator: Generators) -> Tensor:
        scheduler, channels = self.scheduler, x.shape[1]
        scheduler.set_timesteps(steps)  # on the CPU: reading one does not stall the device
        learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
        takes_variance = learned or isinstance(scheduler, DiCoScheduler)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        more: dict[str, Any] = {"generator": generator} if takes_generator else {}
        x = x * scheduler.init_noise_sigma
        bar: Any = self.progress_bar
        for timestep in bar(scheduler.timesteps):
            noised = scheduler.scale_model_input(x, timestep)
            t = timestep.to(x.device).expand(len(x))
            if guidance.acts_at(int(timestep)):
                output = guided_output(self.unet, noised, t, labels, guidance)
            else:
                output = self.unet(noised, t, y=labels)
            output = output.float() if takes_variance else output[:, :channels].float()
            x = scheduler.step(output, timestep, x, **more).prev_sample
        return x

    def _images(self, latents: Tensor, output_type: str) -> Any:
        if self.vae is None:
            self._load_autoencoder()
        pixels = decode(self.vae, latents).cpu()
        if output_type == "pil":
            return [Image.fromarray(image) for image in pixels.numpy()]
        values = pixels.float() / 255
        return values.numpy() if output_type == "np" else values.permute(0, 3, 1, 2)

    def _load_autoencoder(self) -> None:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        vae_id = self.config["vae_id"]
        if not vae_id:
            raise ValueError('the pipeline has no autoencoder: pass vae= when loading, or take output_type="latent"')
        vae: Any = AutoencoderKL.from_pretrained(vae_id, low_cpu_mem_usage=False, use_safetensors=True)
        self.register_modules(vae=vae.to(self._execution_device).eval())
