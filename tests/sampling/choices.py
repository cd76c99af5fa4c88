"""What the tests of selection choose among, and by what."""

import torch

from rpo.sampling.select import How
from rpo.sampling.stepwise import Assessment

PROMPTS = ("a red circle", "two dogs", "a house")
N = 4
HOW = How(num_steps=5, guidance_scale=2.0, eta=1.0, seed=3)


def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2))


def lightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


class OnTheWay:
    """A judge that sees light, and potential in the lighter half of what it sees."""

    def __call__(self, images, prompts):
        return lightness(images, prompts)

    def assess(self, images, prompts, time):
        light = lightness(images, prompts)
        return Assessment(torch.ones_like(light), (light > light.median()).float())


class Asked:
    """A judge that keeps what it was asked about."""

    def __init__(self, judge=redness):
        self.judge, self.images, self.prompts = judge, [], []

    def __call__(self, images, prompts):
        self.images.append(images)
        self.prompts += prompts
        return self.judge(images, prompts)


def counted(model, call):
    """What the call gives, and how many latents went through the denoiser."""
    seen = []
    handle = model.denoiser.register_forward_hook(lambda network, args, output: seen.append(len(args[0])))
    try:
        return call(), sum(seen)
    finally:
        handle.remove()


def assert_chosen_is_drawn(found, every):
    rows = torch.arange(len(PROMPTS))
    torch.testing.assert_close(found.images, every[rows, found.chosen], atol=1e-4, rtol=0)
