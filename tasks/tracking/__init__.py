"""The run in MLflow: what is logged (`entries`), where (`server`), and when (`runs`)."""
