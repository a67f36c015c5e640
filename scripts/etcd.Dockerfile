# etcd of Debian for the compose profile `ha`. TLS both ways, with the certificates that ha-setup put into /ha.
FROM debian:12-slim
RUN apt-get update && apt-get install -y --no-install-recommends etcd-server && rm -rf /var/lib/apt/lists/*
VOLUME /data
EXPOSE 2379 2380
CMD exec etcd --data-dir /data/etcd \
    --listen-client-urls https://0.0.0.0:2379 --advertise-client-urls "https://$ETCD_NAME:2379" \
    --listen-peer-urls https://0.0.0.0:2380 --initial-advertise-peer-urls "https://$ETCD_NAME:2380" \
    --initial-cluster etcd-1=https://etcd-1:2380,etcd-2=https://etcd-2:2380,etcd-3=https://etcd-3:2380 \
    --client-cert-auth --trusted-ca-file /ha/ca.crt --cert-file /ha/etcd.crt --key-file /ha/etcd.key \
    --peer-client-cert-auth --peer-trusted-ca-file /ha/ca.crt --peer-cert-file /ha/etcd.crt --peer-key-file /ha/etcd.key
