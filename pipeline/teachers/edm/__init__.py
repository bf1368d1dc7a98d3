"""Teachers of Karras et al. 2022 (EDM): pixels, a noise level, and a class instead of a text.

folder            what a teacher is as files, whatever network it is
architecture      config.json and model.safetensors;  networks   what they describe: DDPM++ and ADM
preconditioning   what is around a network, and makes a denoiser of it
weights           a network and its weights put together, every name and shape checked
teacher           what a teacher is to everything downstream
student           the same network trained to one step: written, and read again in a few lines
convert           from published checkpoints to a folder (stages/convert_edm.py)
inert_pickle      NVIDIA's files read without running them;  openai_names   OpenAI's names of ADM's parts
"""
