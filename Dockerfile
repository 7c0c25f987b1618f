# docker build -t nvlm . ; docker run --gpus all --ipc=host -v $PWD/runs:/opt/nvlm/runs -it nvlm
#
# NVIDIA's image brings torch, Transformer Engine, Apex and flash-attn, built for each other and for its CUDA. 26.05 has
# Python 3.12, torch 2.12.0a0 and CUDA 13.2. Images before 26.04 have 2.11.0a0 or less: older than the 2.11 of setup.py.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${IMAGE}

WORKDIR /opt/nvlm
COPY . .

# What the image has stays as it is, whatever the packages that are added would like better.
RUN python launch/image_pins.py write /opt/pins.txt
RUN python -m pip install --no-cache-dir --no-build-isolation -c /opt/pins.txt -e '.[slurm]'
RUN python launch/image_pins.py check /opt/pins.txt

# Fails where training would be impossible. There is no GPU while an image is built: what needs one is listed, no more.
RUN python -m nvlm.doctor
