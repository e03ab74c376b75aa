# NVIDIA GPUs:  docker build -f launch/docker/cuda.Dockerfile -t smart-grpo-jax:cuda .
# The wheels of jax[cuda13] bring CUDA and cuDNN; from the host comes only the driver.
FROM python:3.12.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 trainer

WORKDIR /app
COPY setup.py pyproject.toml README.md LICENSE ./
COPY smart_grpo_jax ./smart_grpo_jax
RUN pip install --no-cache-dir ".[cuda]"
COPY configs ./configs

ENV PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER trainer
ENTRYPOINT ["python", "-m", "smart_grpo_jax.main"]
CMD ["--help"]
