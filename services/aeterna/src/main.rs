//! Every service in one process.

use aeterna_rpc::AnyChannel;
use {aeterna_embedding as embedding, aeterna_memory as memory};

fn main() -> std::process::ExitCode {
    let read = |reader: &mut aeterna_rpc::Reader<'_>| {
        let (embedding, memory) = (embedding::Config::read(reader), memory::Config::read(reader));
        embedding.zip(memory)
    };
    let tables = [embedding::SETTINGS, memory::SETTINGS];
    aeterna_rpc::run(
        &tables,
        &[embedding::SERVICE, memory::SERVICE],
        read,
        async |(embed, remember), host| {
            let embedder = host
                .stack
                .wrap(embedding::build(embed, embedding::Deps::of(host)).await?);
            let channel = match remember.embedding.as_str() {
                "local" => AnyChannel::Local(embedder.clone()),
                url => AnyChannel::remote(url)?,
            };
            let service = memory::build(remember, memory::Deps::of(host, channel)).await?;
            Ok(vec![embedder, host.stack.wrap(service.routes)])
        },
    )
}
