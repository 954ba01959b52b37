# docker build -t sapo-train . ; docker run --gpus all --shm-size 16g -v "$PWD:/work" sapo-train config=mine.yaml
FROM vllm/vllm-openai:v0.25.1

# Programs that a model writes run in it; it needs user namespaces: docker run --security-opt seccomp=unconfined
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*

# Dependencies in a layer of their own: a change of the source does not install them again.
WORKDIR /opt/sapo-train
COPY pyproject.toml README.md LICENSE ./
RUN mkdir sapo_rl configs \
    && printf '__version__ = "0.0.0"\n' > sapo_rl/__init__.py \
    && python3 -m pip install --no-cache-dir . \
    && rm -rf sapo_rl configs

COPY sapo_rl sapo_rl
COPY configs configs
RUN python3 -m pip install --no-cache-dir --no-deps --force-reinstall . \
    && useradd --create-home --uid 10001 sapo \
    && install --directory --owner sapo /work

USER 10001
WORKDIR /work
ENV HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
ENTRYPOINT ["sapo-train"]
