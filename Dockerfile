# `train` has all code, `jobs` runs the notebooks, `build` trains a model from the committed sample, the last stage serves.
# Training code, notebooks and build tools stay out of the last.
#
#   docker build -t product-recs .
#   docker build --target jobs -t product-recs-jobs .

FROM python:3.11-slim AS train
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# implicit is compiled with OpenMP; serving does not need it. The compiler is for the kernels of this project
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# what serving needs, and nothing else: the list stands in settings.ini; pip itself stays outside
COPY settings.ini ./
RUN python -c "import configparser, shlex; c = configparser.ConfigParser(delimiters=['='], interpolation=None); c.read('settings.ini'); \
print(*shlex.split(c['DEFAULT']['serve_requirements']), sep='\n')" > /tmp/serve.txt \
 && python -m venv --without-pip /opt/venv \
 && pip --python /opt/venv/bin/python install -r /tmp/serve.txt

COPY setup.py pyproject.toml README.md LICENSE ./
# the package holds the notebooks that run, the sample and the examples, for `product-recs init`
COPY nbs nbs
COPY data data
COPY examples examples
# the sources go again: a job runs in this folder, and would import them in place of the package with its kernels
COPY product_recs product_recs
RUN pip wheel --no-deps --wheel-dir /tmp/wheels . && rm -rf product_recs build

RUN python -m venv /opt/train && /opt/train/bin/pip install "$(echo /tmp/wheels/*.whl)[jobs]"


# every job of the command line: a parameter file, data, models and reports are mounted into /app
FROM python:3.11-slim AS jobs
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /app --shell /usr/sbin/nologin app
WORKDIR /app
COPY --from=train /opt/train /opt/train
COPY --from=train /src/nbs nbs
COPY --from=train /src/examples examples
# the examples in the notebooks read it from data/, where a volume lies: copy it there (deploy/kustomize/base/jobs.yaml does)
COPY --from=train /src/data /opt/sample
RUN install --directory --owner=10001 --group=10001 data models reports
# Jupyter's kernel writes its connection file into the home
ENV PATH=/opt/train/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PRODUCT_RECS_ROOT=/app \
    HOME=/tmp
USER 10001:10001
CMD ["product-recs", "--help"]


FROM train AS build
# the whole pipeline, from the committed log to a published bundle
RUN /opt/train/bin/product-recs run --name sample

# last, so that a change of the code keeps the layers of the requirements; what `init` lays into a workspace and tests of
# libraries are of no use in service
RUN pip --python /opt/venv/bin/python install --no-deps /tmp/wheels/*.whl \
 && rm -rf /opt/venv/lib/python*/site-packages/product_recs/jobs/workspace \
 && find /opt/venv/lib -type d -path '*/site-packages/*' \( -name tests -o -name include \) -prune -exec rm -rf {} +


FROM python:3.11-slim
LABEL org.opencontainers.image.title="product_recs" \
      org.opencontainers.image.description="Top-N recommendations over HTTP from a trained model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/product-recs/product_recs"

RUN useradd --uid 10001 --user-group --no-create-home --home-dir /app --shell /usr/sbin/nologin app
WORKDIR /app
COPY --from=build /opt/venv /opt/venv
# a folder mounted here is served instead
COPY --from=build /src/models /app/models
# what the service writes: feedback (where there is no PostgreSQL) and hashes of API keys; the only place that it may write to
RUN install --directory --owner=10001 --group=10001 --mode=0750 /app/state
VOLUME /app/state

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PRODUCT_RECS_HOST=0.0.0.0 \
    PRODUCT_RECS_PORT=8000 \
    PRODUCT_RECS_MODELS_DIR=/app/models \
    PRODUCT_RECS_API_KEYS_FILE=/app/state/api_keys.json \
    PRODUCT_RECS_DATABASE_URL=sqlite:////app/state/feedback.db
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['PRODUCT_RECS_PORT'] + '/health/ready', timeout=2)"]
CMD ["product-recs", "serve"]
