# One image for the worker, the migration and the simulated services. The lock pins every package with its hashes.
FROM python:3.11.14-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

COPY requirements.lock ./
RUN pip install --require-hashes --requirement requirements.lock

COPY worker.py starter.py ./
COPY holdfast ./holdfast
COPY workflows ./workflows
COPY activities ./activities
COPY agents ./agents

# /data takes the simulated services' files, /work what agents write; the application itself writes nothing.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin holdfast && install -d -o holdfast /data /work
USER holdfast

CMD ["python", "worker.py"]
