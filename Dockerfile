# docker build -t nvlm . ; docker run --gpus all --ipc=host -v $PWD/runs:/opt/nvlm/runs -it nvlm
#
# NVIDIA's image has torch, Transformer Engine, Apex and flash-attn, built for each other and for its CUDA. 26.05 has
# Python 3.12, torch 2.12.0a0 and CUDA 13.2. Images before 26.04 have torch 2.11.0a0 or older; setup.py requires 2.11.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${IMAGE}

WORKDIR /opt/nvlm
COPY . .

# The image's packages keep their versions, whatever the added packages would prefer.
RUN python launch/image_pins.py write /opt/pins.txt
RUN python -m pip install --no-cache-dir --no-build-isolation -c /opt/pins.txt -e '.[slurm]'
RUN python launch/image_pins.py check /opt/pins.txt

# Fails if training would be impossible. No GPU is available during a build, so what needs one is only listed.
RUN python -m nvlm.doctor
