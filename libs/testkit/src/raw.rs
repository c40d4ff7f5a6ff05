//! Calls with encoded messages, for tests that make their messages from the contracts.

use aeterna_rpc::AnyChannel;
use bytes::{Buf as _, BufMut as _, Bytes};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Request, Status};

/// Bytes in, bytes out.
#[derive(Clone, Copy, Debug, Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Vec<u8>;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// A client of any RPC.
#[derive(Clone, Debug)]
pub struct RawClient(AnyChannel);

impl RawClient {
    /// Over a channel.
    pub fn new(channel: AnyChannel) -> Self {
        Self(channel)
    }

    /// Calls a unary RPC by its path, `/package.Service/Method`.
    ///
    /// # Errors
    /// What the server answers.
    ///
    /// # Panics
    /// When the path is no path.
    pub async fn call(&self, path: &str, request: Request<Vec<u8>>) -> Result<Bytes, Status> {
        let mut grpc = tonic::client::Grpc::new(self.0.clone())
            .max_decoding_message_size(256 << 20)
            .max_encoding_message_size(256 << 20);
        grpc.ready()
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let path: http::uri::PathAndQuery = path.parse().expect("the path is one");
        Ok(grpc.unary(request, path, RawCodec).await?.into_inner())
    }
}
