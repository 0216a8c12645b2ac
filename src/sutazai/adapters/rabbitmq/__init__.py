"""RabbitMQ: queues over aio-pika, streams over rstream."""
