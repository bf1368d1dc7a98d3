"""Teachers of Karras et al. 2022 (EDM): pixels, a noise level, and a class instead of a text.

folder         config.json and model.safetensors
networks       DDPM++, ADM, and the preconditioning around them
weights        the two put together, every name and shape checked
teacher        what a teacher is to everything downstream
student        the same network trained to one step: written, and read again in a few lines
convert        from published checkpoints to a folder (stages/convert_edm.py)
inert_pickle   NVIDIA's files read without running them;  openai_names   OpenAI's names of ADM's parts
"""
