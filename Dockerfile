# xfm-fast serve on a CPU, as a user without rights:
#   docker build -t xfm-fast .
#   docker run -p 8000:8000 -v ~/.cache/huggingface:/models -e XFM_API_KEY=... xfm-fast sentence-transformers/all-MiniLM-L6-v2
FROM python:3.12-slim

# Kernels are compiled for the processor at the first start; OpenMP's runtime comes with PyTorch.
ENV HF_HOME=/models \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

RUN pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install "/src[serve,hf]" && rm -rf /src

RUN useradd --create-home xfm && mkdir /models && chown xfm /models
USER xfm
WORKDIR /home/xfm
VOLUME /models
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# Docker stops it with SIGTERM: it answers what is in flight, up to --timeout.
ENTRYPOINT ["xfm-fast", "serve", "--host", "0.0.0.0", "--port", "8000"]
