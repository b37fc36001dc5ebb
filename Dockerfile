# Training image: NVIDIA's PyTorch with its Transformer Engine, apex with CUDA extensions, and this package (docs/docker.md).
#   docker build -t evomoe .
# 25.12 has Python 3.12, CUDA 13.1 and torch 2.10. docker/verify.py stops the build if the chosen megatron-core does not
# accept the image's Transformer Engine.
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

# The commit of 25.09, apex's newest tag.
ARG APEX_COMMIT=4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49
ARG MAX_JOBS=8
COPY docker/apex.sh /opt/evomoe/docker/apex.sh
RUN bash /opt/evomoe/docker/apex.sh "${APEX_COMMIT}" "${MAX_JOBS}"

# 0.16.1 declares the versions of Transformer Engine that it accepts; 0.19 declares none.
ARG MEGATRON_CORE=0.16.1
ARG EXTRAS=hf,eval
COPY . /opt/evomoe
RUN bash /opt/evomoe/docker/install.sh "${MEGATRON_CORE}" "${EXTRAS}"

# USER is a number, so that Kubernetes can check that it is not root. Ubuntu 24.04's images already have a user 1000.
RUN useradd --uid 10001 --create-home evomoe && install -d -o evomoe /workspace/runs
USER 10001
WORKDIR /workspace
ENV PYTHON=python3
HEALTHCHECK --interval=5m --timeout=2m --start-period=2m CMD ["python3", "-m", "megatron_evomoe", "doctor"]
CMD ["python3", "-m", "megatron_evomoe", "doctor"]
