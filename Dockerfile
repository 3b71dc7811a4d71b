# nitsum-jax for CPU, or with --build-arg EXTRA=cuda12 for NVIDIA GPUs (the host needs the NVIDIA container toolkit).
#   docker build -t nitsum-jax .
#   docker run --rm -p 8000:8000 -v "$PWD/keys.toml:/keys/keys.toml:ro" nitsum-jax --http_port=8000 --api_keys=/keys/keys.toml
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG EXTRA=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY nitsum_jax nitsum_jax
# constraints.txt pins what the project is tested with; the CUDA libraries come from jax[cuda12] at the versions it wants.
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir -c constraints.txt ".[otel${EXTRA:+,$EXTRA}]"

FROM python:${PYTHON}-slim
COPY --from=build /venv /venv
RUN useradd --create-home --uid 10001 nitsum \
 && mkdir /cache && chown nitsum /cache
USER nitsum
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache
# Compiled executables and downloaded models: mount a volume here to keep them between starts.
VOLUME /cache
EXPOSE 50051 8000 9400
# All addresses, because nobody could reach a container otherwise; without keys administration is refused then.
ENTRYPOINT ["nitsum-serve", "--host=0.0.0.0", "--log_format=json", "--log_level=info"]
CMD ["--model=smollm2-135m", "--http_port=8000"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m \
  CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"
