# syntax=docker/dockerfile:1
# One image for the API, the scheduler, the Ray head and the Ray workers, because Ray wants the same Python, Ray and
# Mergemill on every node. Two targets differ in torch alone:
#   docker build --target cpu --tag mergemill:cpu .
#   docker build --target gpu --tag mergemill:gpu .
# The default index may serve a CUDA build of torch for x86-64; for a small `cpu` image give PyTorch's CPU wheel
# index as --build-arg TORCH_CPU_INDEX_URL=...

FROM python:3.11-slim-bookworm AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0

# Everything but torch: none of it depends on torch, so both targets share this layer, and changed sources leave it alone.
FROM base AS dependencies
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
    && python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
wanted = project["dependencies"] + project["optional-dependencies"]["otel"]; \
print(*(line for line in wanted if not line.startswith("torch=")), sep="\n")' > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt

FROM dependencies AS dependencies-cpu
ARG TORCH_CPU_INDEX_URL=""
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ${TORCH_CPU_INDEX_URL:+--extra-index-url "$TORCH_CPU_INDEX_URL"} torch

# The CUDA libraries come as wheels that torch depends on; the host brings the driver and its container toolkit.
FROM dependencies AS dependencies-gpu
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt torch

FROM dependencies AS wheel
COPY README.md LICENSE ./
COPY api api
COPY service service
COPY workers workers
COPY mergemill mergemill
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base AS runtime
# tini reaps what Ray leaves behind and passes signals on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home mergemill
COPY --chmod=755 deploy/schedule-on-ray deploy/create-bucket /usr/local/bin/
# Metrics are shown to other machines only with MERGEMILL_METRICS_TOKEN, whatever address they are on.
ENV MERGEMILL_HOST=0.0.0.0 \
    MERGEMILL_METRICS_HOST=0.0.0.0 \
    MERGEMILL_PORT=8080
EXPOSE 8080
ENTRYPOINT ["tini", "--"]
CMD ["mergemill", "serve"]
# For the image's default command; docker-compose.yml says what healthy means for the other roles.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['MERGEMILL_PORT'] + '/healthz', timeout=4)"]

FROM runtime AS gpu
COPY --from=dependencies-gpu /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl && pip check
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /home/mergemill
# Compiled for the processor that builds the image; on another kind workers compile again, once.
RUN python -c 'from workers.kernels.cpu import prepare; prepare()'

FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl && pip check
USER 10001:10001
WORKDIR /home/mergemill
# Compiled for the processor that builds the image; on another kind workers compile again, once.
RUN python -c 'from workers.kernels.cpu import prepare; prepare()'
