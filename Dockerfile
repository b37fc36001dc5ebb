# Training image: NVIDIA's PyTorch with its Transformer Engine, apex with CUDA extensions, and this package. docs/docker.md
#   docker build -t evomoe .
# 25.12: Python 3.12, CUDA 13.1, torch 2.10. docker/verify.py stops the build where the image's Transformer Engine is not
# what the chosen megatron-core wants.
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

# 25.09, apex's newest tag
ARG APEX_COMMIT=4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49
ARG MAX_JOBS=8
COPY docker/apex.sh /opt/evomoe/docker/apex.sh
RUN bash /opt/evomoe/docker/apex.sh "${APEX_COMMIT}" "${MAX_JOBS}"

# 0.16.1 names the versions of Transformer Engine it takes; 0.19 names none
ARG MEGATRON_CORE=0.16.1
ARG EXTRAS=hf,eval
COPY . /opt/evomoe
RUN bash /opt/evomoe/docker/install.sh "${MEGATRON_CORE}" "${EXTRAS}"

# a number, so that Kubernetes can see it is not root; 1000 is taken in Ubuntu 24.04's images
RUN useradd --uid 10001 --create-home evomoe && install -d -o evomoe /workspace/runs
USER 10001
WORKDIR /workspace
ENV PYTHON=python3
HEALTHCHECK --interval=5m --timeout=2m --start-period=2m CMD ["python3", "-m", "megatron_evomoe", "doctor"]
CMD ["python3", "-m", "megatron_evomoe", "doctor"]
