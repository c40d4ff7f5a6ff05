//! Plain HTTP, without a client that would be too clever.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Sends one HTTP/1.1 request as it is (it should say `connection: close`); the whole answer as text.
///
/// # Errors
/// When the connection fails.
pub async fn http(address: SocketAddr, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// What a process says of its readiness: the whole answer to GET /readyz.
///
/// # Errors
/// When the connection fails.
pub async fn readyz(address: SocketAddr) -> std::io::Result<String> {
    get(address, "/readyz").await
}

/// What a server answers to a plain GET, head and body.
///
/// # Errors
/// When the connection fails.
pub async fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    http(address, &request).await
}
