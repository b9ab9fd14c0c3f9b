from __future__ import annotations

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from loratune.diffusion.process import linear_betas
from loratune.diffusion.schedule import NoiseSchedule


def test_a_step_of_the_flow_is_the_schedulers() -> None:
    schedule, theirs = NoiseSchedule.flow(), FlowMatchEulerDiscreteScheduler()
    t = torch.tensor([0, 499, 999])
    time = schedule.time(t)
    x_0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    a, b = schedule.at(t, x_0)
    torch.testing.assert_close(a * x_0 + b * noise, theirs.scale_noise(x_0, time, noise), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(time, theirs.timesteps.flip(0)[t])
    assert schedule.ends_in_noise
    assert schedule.ending_in_noise() is schedule


def test_a_step_of_ddpm_is_the_schedulers() -> None:
    schedule = NoiseSchedule.ddpm(linear_betas(1000))
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    t = torch.tensor([0, 499, 999])
    x_0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    a, b = schedule.at(t, x_0)
    torch.testing.assert_close(a * x_0 + b * noise, theirs.add_noise(x_0, noise, t), rtol=1e-4, atol=1e-5)
    assert torch.equal(schedule.time(t), t)
    assert not schedule.ends_in_noise
    assert schedule.ending_in_noise().ends_in_noise
