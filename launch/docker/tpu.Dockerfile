# TPU (GKE, or docker on a TPU VM):  docker build -f launch/docker/tpu.Dockerfile -t smart-grpo-jax:tpu .
FROM python:3.12.11-slim-bookworm

# git: the run folder records the commit it ran from.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 trainer

WORKDIR /app
COPY setup.py pyproject.toml README.md LICENSE ./
COPY smart_grpo_jax ./smart_grpo_jax
RUN pip install --no-cache-dir ".[tpu]"
COPY configs ./configs

ENV PYTHONUNBUFFERED=1
USER trainer
ENTRYPOINT ["python", "-m", "smart_grpo_jax.main"]
CMD ["--help"]
