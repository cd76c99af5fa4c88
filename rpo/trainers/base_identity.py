"""What a run starts from, as far as it decides the result: a resumed run must start from the same."""

from rpo.models.base import DiffusionModel
from rpo.models.fingerprint import describe_schedule, hash_network
from rpo.models.stable_diffusion import StableDiffusion


def base_identity(model: DiffusionModel) -> dict[str, str]:
    """The parts of a checkpoint that count, as text by name; ask before anything is trained.

    Args:
        model: The checkpoint.
    """
    found = {"prediction_type": str(model.prediction_type), **describe_schedule(model.scheduler_config)}
    if not isinstance(model, StableDiffusion):
        return found | {"base.denoiser": hash_network(model.denoiser, {}, {})[:16]}
    text = model.text_encoder
    # The library writes its own version into the configuration, which is no other text encoder.
    config = {name: value for name, value in text.config.to_dict().items() if name != "transformers_version"}
    vocabulary = {"vocab": model.tokenizer.get_vocab(), "max_length": model.tokenizer.model_max_length}
    return found | {
        "base.unet": hash_network(model.denoiser, model.denoiser.config, {})[:16],
        "base.vae": hash_network(model.vae, model.vae.config, {})[:16],
        "base.text_encoder": hash_network(text, config, vocabulary)[:16],
        "vae.scaling_factor": str(model.vae.config["scaling_factor"]),
        "dtype": f"{model.weight_dtype}, vae {model.vae.dtype}, text encoder {text.dtype}",
        "compute_dtype": str(model.compute_dtype),
    }
