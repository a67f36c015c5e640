"""Headers: a binding asks for headers of the record, all of them or any, instead of a routing key.

python examples/headers.py                # against a running cluster: `ferryline up`
"""

from __future__ import annotations

import asyncio

import ferryline as fl

DOCUMENTS = {
    "invoice": {"format": "pdf", "kind": "invoice"},
    "photo": {"format": "png", "kind": "photo"},
    "scan": {"format": "pdf", "kind": "photo", "urgent": "no"},
}


async def main() -> None:
    async with fl.connect() as client:
        admin = client.admin
        await admin.create_exchange("documents", "headers", exist_ok=True)
        for topic in ("pdf-invoices", "pdf-or-photo", "marked-urgent"):
            await admin.create_topic(topic, partitions=1, exist_ok=True)
        await admin.bind("documents", topic="pdf-invoices", headers={"format": "pdf", "kind": "invoice"})
        await admin.bind("documents", topic="pdf-or-photo", headers={"format": "pdf", "kind": "photo"}, match="any")
        await admin.bind("documents", topic="marked-urgent", headers={"urgent": None})  # whatever its value
        async with client.producer() as producer:
            for name, headers in DOCUMENTS.items():
                reached = await producer.publish("documents", name, headers=headers)
                print(f"{name} -> {', '.join(reached)}")


if __name__ == "__main__":
    asyncio.run(main())
