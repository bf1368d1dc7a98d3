"""The mathematics of diffusion in pure torch: no files, no configuration, no logging, no global random state.

One picture is enough to read every module here. A clean sample x0 is mixed with unit Gaussian noise eps,

    x_t = alpha_t x0 + sigma_t eps,        eps ~ N(0, I),

and a network looks at x_t and guesses what was mixed. The modules, in reading order:

* :mod:`~pipeline.diffusion.schedules`: the map t -> (alpha_t, sigma_t).
* :mod:`~pipeline.diffusion.parametrization`: the five things a network may predict, and how each one determines x0.
* :mod:`~pipeline.diffusion.denoiser`: a network made into a denoiser, (x_t, t, condition) -> x0 = E[x0 | x_t].
* :mod:`~pipeline.diffusion.guidance`: a denoiser that listens harder to its condition.
* :mod:`~pipeline.diffusion.samplers`: from pure noise to x0, one noise level after another.
* :mod:`~pipeline.diffusion.mixture`: a distribution whose perfect denoiser is known in closed form.

Conventions. Samples have shape (B, *), t and the coefficients have shape () or (B,). The field calls both the noise
scale and the schedule's output ``sigma``, and so do we. Arithmetic is float32 or wider; only the network itself may
run in less, and only inside its own call.
"""
