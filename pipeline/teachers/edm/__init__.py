"""Teachers of Karras et al. 2022 (EDM): pixels, a noise level, and a class instead of a text.

folder            what a teacher is as files, and which kinds there are
architecture      config.json and model.safetensors;  networks   what they describe: DDPM++ and ADM
diffusers_folder  unet/ and scheduler/;  unet2d_config   the network's config;  diffusers_unet   the network
preconditioning   what is around either network, and makes a denoiser of it
float32_linear    the layers of either that are told of noise level and class
weights           a network and its weights put together, every name and shape checked
teacher           what a teacher is to everything downstream
student           the same network trained to one step: written, and read again in a few lines
convert           from published checkpoints to a folder (stages/convert_edm.py)
inert_pickle      NVIDIA's files read without running them;  openai_names   OpenAI's names of ADM's parts
"""
