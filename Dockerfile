# docker build -t parapolicy .                                    # torch as pip finds it: with CUDA; run with --gpus all
# docker build -t parapolicy:cpu --build-arg TORCH_INDEX=URL .    # torch from another index, of its CPU wheels
# docker run --rm -v "$PWD/checkpoints:/checkpoints:ro" parapolicy eval checkpoint=/checkpoints/pusht_lowdim
# docker run --rm -p 8000:8000 -v "$PWD/checkpoints:/checkpoints:ro" parapolicy \
#     serve checkpoint=/checkpoints/pusht_lowdim host=0.0.0.0
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir build
COPY . /source
RUN python -m build --wheel --outdir /wheels /source

FROM python:${PYTHON}-slim
# An index of torch's wheels; empty: pip's own. A GPU needs only the host's driver.
ARG TORCH_INDEX=
# Where the engine fused has no library for the processor, it is compiled; so is the engine compiled.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt torch ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} && \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)[eval,serve]"
RUN useradd --create-home robot
USER robot
WORKDIR /home/robot
ENTRYPOINT ["parapolicy"]
CMD ["--help"]
