# docker build -t parapolicy .                                                      # CPU
# docker build -t parapolicy:cuda --build-arg TORCH=cu130 .                          # CUDA; run with --gpus all
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
# A wheel index of torch: cpu, or a CUDA version such as cu130. A GPU needs only the host's driver.
ARG TORCH=cpu
# Where the engine fused has no library for the processor, it is compiled; so is the engine compiled.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt torch --index-url "https://download.pytorch.org/whl/${TORCH}" && \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)[eval,serve]"
RUN useradd --create-home robot
USER robot
WORKDIR /home/robot
ENTRYPOINT ["parapolicy"]
CMD ["--help"]
